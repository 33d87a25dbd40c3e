"""The front end of an LLM: what vLLM calls EngineCoreClient, InputProcessor and OutputProcessor."""
