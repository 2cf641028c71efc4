"""Check that a corpus is sound, and find what killed writers left in it."""
