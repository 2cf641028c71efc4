"""Whether a corpus is sound, and what killed writers left in it."""
