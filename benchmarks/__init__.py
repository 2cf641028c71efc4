"""Ratios against named peers: one command each, `--json` prints one object."""
