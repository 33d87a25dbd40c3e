"""Helpers independent of the engine: argument checks, vLLM's parameter names, progress, processes, timing."""
