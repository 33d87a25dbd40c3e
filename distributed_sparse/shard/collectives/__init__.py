"""Collectives between the ranks over NCCL, gloo or shared memory. vLLM calls these device communicators."""
