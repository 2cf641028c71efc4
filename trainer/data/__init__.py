"""Order of the samples, their shards, and the batches made of them."""
