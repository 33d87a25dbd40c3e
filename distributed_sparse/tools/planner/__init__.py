"""The planner behind `launch.plan`: bytes, memory, limits and expected times of an engine without starting it."""
