"""What every folder may use: errors, threads, liveness, signals, progress, fail points."""
