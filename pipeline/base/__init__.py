"""Basics for every folder: errors, threads, liveness, signals, progress, fail points."""
