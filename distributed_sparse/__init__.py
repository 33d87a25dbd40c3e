"""distributed-sparse: tensor-parallel sparse-attention decoding of Hugging Face models."""

from typing import TYPE_CHECKING, Any

from distributed_sparse.config import EngineConfig
from distributed_sparse.outputs import CompletionOutput, Logprob, RequestOutput, ScoreOutput
from distributed_sparse.prompts import TextPrompt, TokensPrompt
from distributed_sparse.sampling_params import SamplingParams

if TYPE_CHECKING:
    from distributed_sparse.llm import LLM, EngineError

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


def __getattr__(name: str) -> Any:
    """LLM brings torch and transformers: imported when it is first asked for, so the Driver can do without."""
    if name in ("LLM", "EngineError"):
        from distributed_sparse import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
