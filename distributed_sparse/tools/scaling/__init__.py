"""A grid of settings, each measured in an engine of its own and held against what it should be."""
