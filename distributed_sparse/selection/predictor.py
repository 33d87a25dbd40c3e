"""Deprecated name of `distributed_sparse.selection.top_k`; removed in the next version."""

import warnings

from distributed_sparse.selection.top_k import Scorer as Predictor
from distributed_sparse.selection.top_k import TopKConfig, TopKPolicy, best_pages, top_k_logical

__all__ = ["Predictor", "TopKConfig", "TopKPolicy", "best_pages", "top_k_logical"]

warnings.warn(
    "distributed_sparse.selection.predictor is now distributed_sparse.selection.top_k, and Predictor is Scorer",
    FutureWarning,
    stacklevel=2,
)
