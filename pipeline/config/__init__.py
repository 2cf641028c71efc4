"""The YAML of a build: one file for each block, and the reader."""
