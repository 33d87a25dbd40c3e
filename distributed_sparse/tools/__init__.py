"""What measures the engine: benchmarks, evaluation, scaling runs, chaos tests, the planner. The engine imports none of it."""
