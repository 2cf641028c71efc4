"""Look at a few samples of a data set: find its layout, and the config that builds it."""
