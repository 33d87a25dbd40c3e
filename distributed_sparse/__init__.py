"""distributed-sparse: tensor-parallel sparse-attention decoding of Hugging Face models."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed_sparse.client.client import EngineError
    from distributed_sparse.client.prompts import TextPrompt, TokensPrompt
    from distributed_sparse.config import EngineConfig
    from distributed_sparse.llm import LLM
    from distributed_sparse.outputs import CompletionOutput, Logprob, RequestOutput, ScoreOutput
    from distributed_sparse.sampling_params import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CompletionOutput",
    "EngineConfig",
    "EngineError",
    "Logprob",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "TextPrompt",
    "TokensPrompt",
]

_MODULES = {
    "client.client": ("EngineError",),
    "client.prompts": ("TextPrompt", "TokensPrompt"),
    "config": ("EngineConfig",),
    "llm": ("LLM",),
    "outputs": ("CompletionOutput", "Logprob", "RequestOutput", "ScoreOutput"),
    "sampling_params": ("SamplingParams",),
}


def __getattr__(name: str) -> Any:
    """A public name is imported when it is first asked for: `LLM` brings torch and transformers."""
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(f"distributed_sparse.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
