"""A grid of settings, each measured in its own engine and checked against expectations."""
