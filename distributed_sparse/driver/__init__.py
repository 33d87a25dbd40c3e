"""The engine core (pure Python, no torch): requests, scheduling, publishing and recovery.

`Driver` is vLLM's EngineCore, `DriverService` (service.py: its thread, inbox and outboxes) is EngineCoreProc.
"""
