"""distributions: KL divergence of next-token distributions, and the memory that their tables take."""

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
    # -inf in the reference contributes 0; rounding of float32 inputs can make the sum slightly negative
    return np.maximum(np.where(np.isneginf(p), 0.0, terms).sum(-1), 0.0)


def table_bytes(length: int, vocab_size: int) -> int:
    """Bytes of float32 log-probabilities over the whole vocabulary at `length` positions."""
    return 4 * length * vocab_size
