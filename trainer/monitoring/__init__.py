"""Reports of a run: log, speed, validation loss, pictures, gradients that are not finite."""
