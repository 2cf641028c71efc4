"""The format of docs/reference/corpus.md: names, records, shard files, reading, and writing exactly once."""
