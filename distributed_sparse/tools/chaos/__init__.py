"""chaos: the soak test (`python -m launch.chaos`), which sends random requests to an engine under random faults."""
