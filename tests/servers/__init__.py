"""Servers on loopback that tests talk to: S3, files, the hub."""
