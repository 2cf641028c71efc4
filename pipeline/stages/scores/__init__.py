"""Stages that score samples: by pixels, by caption, by vision models."""
