"""What a stage is, and the stages: one shard in, one shard of each column out."""
