"""Build a latent corpus of image-caption pairs, and train a MicroDiT on it."""
