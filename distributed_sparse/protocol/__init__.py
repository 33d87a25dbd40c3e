"""Messages as msgspec structs: step.py between the Driver and the ranks, client.py between a client and the Driver.

`StepPlan` and `StepResult` are vLLM's SchedulerOutput and ModelRunnerOutput; `NewRequest` and `RequestUpdate` are its
EngineCoreRequest and EngineCoreOutput.
"""
