"""What a run reports: log, speed, validation loss, pictures, gradients that are not finite."""
