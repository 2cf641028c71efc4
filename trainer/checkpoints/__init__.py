"""What a checkpoint holds, and where it is kept."""
