"""How far one next-token distribution is from another."""

from __future__ import annotations

import numpy as np


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) in nats, float64 [rows].

    Args:
        reference, other: [rows, vocab] natural log-probabilities.
    """
    p, q = reference.astype(np.float64), other.astype(np.float64)
    with np.errstate(invalid="ignore"):
        terms = np.exp(p) * (p - q)
    # a token that the reference excludes adds nothing; float32 inputs let the sum fall a little below 0
    return np.maximum(np.where(np.isneginf(p), 0.0, terms).sum(-1), 0.0)


def same_top_token(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether both hold the same token most likely: bool [rows]."""
    return reference.argmax(-1) == other.argmax(-1)


def table_bytes(length: int, vocab_size: int) -> int:
    """Memory of a sequence's log-probabilities over the whole vocabulary, float32."""
    return 4 * length * vocab_size
