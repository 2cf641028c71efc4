"""Stages that write captions: given ones, vision-language models, endpoints, tags."""
