"""Stateless helpers: argument checks, vLLM's parameter names, progress, processes, timing."""
