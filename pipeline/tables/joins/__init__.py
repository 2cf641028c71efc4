"""Tables from outside, sorted by key and joined to the samples of a source."""
