"""Carry out a build on Ray: plan, driver, actors, workers, retries."""
