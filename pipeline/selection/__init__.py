"""The SQL view over samples, named queries, weights, and saved keep-lists."""
