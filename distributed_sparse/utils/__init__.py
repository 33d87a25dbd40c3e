"""Helpers without an engine's state: argument checks, vLLM's parameter names, progress, processes, timing."""
