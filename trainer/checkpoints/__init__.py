"""Contents of a checkpoint, and the folder or bucket that keeps it."""
