"""Stages: what a stage is, and those that make images, captions, scores, latents and text."""
