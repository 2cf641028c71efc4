"""What the YAML of a build may say: one file for each block."""
