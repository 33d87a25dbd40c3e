"""limits: resolves settings left at "auto" or None (max_model_len, device, dtype, EOS), equally on client and ranks."""

from __future__ import annotations

import logging
from typing import Any

import torch

from distributed_sparse.model.config import ModelConfig

logger = logging.getLogger(__name__)


def longest_context(model: ModelConfig) -> int:
    """Tokens of the longest context that the checkpoint's positions support.

    With linear, yarn and llama3 scaling, max_position_embeddings may be the length before scaling: Qwen2.5's `rope_scaling`
    comes with an unchanged max_position_embeddings, and linear scaling has no other field for it.
    """
    stated, rope = model.max_position_embeddings, model.rope
    if rope.rope_type not in ("linear", "yarn", "llama3") or rope.factor is None:
        return stated
    return max(stated, int(rope.factor * (rope.original_max_position_embeddings or stated)))


def resolve_max_model_len(max_model_len: int | None, model: ModelConfig) -> int:
    """Maximum tokens of prompt and output together; None takes the checkpoint's limit.

    Raises:
        ValueError: it exceeds the checkpoint's positions, or a sliding window would hide tokens.
    """
    limit = longest_context(model)
    if max_model_len is None:
        max_model_len = limit
    elif max_model_len > limit and model.rope.rope_type != "dynamic":
        raise ValueError(
            f"max_model_len={max_model_len} is over the {limit} positions of the checkpoint "
            f"(max_position_embeddings={model.max_position_embeddings}, rope_type={model.rope.rope_type}); use at most {limit}"
        )
    model.check_context(max_model_len)
    return max_model_len


def resolve_device(device: str) -> torch.device:
    """The torch device; "auto" is the current GPU if there is one.

    Raises:
        ValueError: "cuda" without a GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device='cuda' but this process sees no CUDA device; use device='cpu', or give each rank a GPU")
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(device)


def resolve_dtype(dtype: str, checkpoint: torch.dtype) -> torch.dtype:
    """The torch dtype; "auto" is the checkpoint's dtype."""
    return checkpoint if dtype == "auto" else getattr(torch, dtype)


def resolve_eos_token_ids(model: ModelConfig, tokenizer: Any | None) -> tuple[int, ...]:
    """The tokens that end a sequence, as in vLLM: those of the checkpoint and the tokenizer's, if there is a tokenizer."""
    eos, own = model.eos_token_ids, getattr(tokenizer, "eos_token_id", None)
    if own is not None and own >= model.vocab_size:
        logger.warning(
            "the tokenizer's eos_token_id=%d is past vocab_size=%d: the model never writes it", own, model.vocab_size
        )
    elif own is not None and own not in eos:
        eos = (*eos, own)
    if not eos:
        logger.warning(
            "neither the checkpoint nor the tokenizer names an eos_token_id: outputs end at max_tokens, stop_token_ids or stop"
        )
    return eos
