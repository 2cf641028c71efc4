"""The format of docs/corpus.md: names, records, shard files, reading, and writing exactly once."""
