"""The planner: bytes, memory, limits and expected times of an engine that nobody has started. What `launch.plan` calls."""
