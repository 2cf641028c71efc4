"""Models of others: autoencoders, text encoders, captioners, scorers, and their files."""
