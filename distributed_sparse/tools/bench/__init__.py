"""Benchmarks: what `python -m launch.bench` runs. Each checks its result before it prints a speed."""
