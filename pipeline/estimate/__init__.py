"""Estimate bytes, hours and money before a build."""
