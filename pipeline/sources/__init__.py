"""What a source is, and the sources."""
