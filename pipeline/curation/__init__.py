"""Jobs over the whole corpus: near-duplicates by hash and by embedding, contamination."""
