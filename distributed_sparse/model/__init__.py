"""The dense decoder of a Hugging Face checkpoint: config, weight loading, tensor-parallel sharding, forward pass.

In vLLM: `model_executor` (models and the model loader) and the model part of ModelConfig.
"""
