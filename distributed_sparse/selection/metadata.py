"""Deprecated name of `distributed_sparse.cache`; removed in the next version."""

import warnings

from distributed_sparse.cache import AppendRuns, Geometry, LayerCache, Metadata, PageMinMax, QuantizedKeys

__all__ = ["AppendRuns", "Geometry", "LayerCache", "Metadata", "PageMinMax", "QuantizedKeys"]

warnings.warn("distributed_sparse.selection.metadata is now distributed_sparse.cache", FutureWarning, stacklevel=2)
