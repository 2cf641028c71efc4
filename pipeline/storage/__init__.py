"""Immutable objects by name: one `Store`, on a disk or in a bucket."""
