"""The soak: random requests under random faults, and a table of what was lost. Run by `python -m launch.chaos`."""
