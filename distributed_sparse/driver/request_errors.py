"""request_errors: error messages of requests that end with an error while the engine goes on."""

from __future__ import annotations

import logging
import math

from distributed_sparse.protocol.step import BadLogits
from distributed_sparse.ranks.base import ShardFailure

logger = logging.getLogger(__name__)

NOT_OF_A_REQUEST = (ShardFailure, KeyboardInterrupt, SystemExit, GeneratorExit)
"""Exceptions that end more than one request. Any other exception ends only the request being processed, even a BaseException:
a panic inside the `tokenizers` library is one."""


def engine_error(raised: BaseException, request_id: str) -> str:
    """The error message of a request whose processing raised `raised`, which is logged with its traceback."""
    logger.error("request %r ends with an error: the engine failed on it", request_id, exc_info=raised)
    return f"the engine failed on this request alone: {type(raised).__name__}: {raised}"


def bad_logits_error(bad: BadLogits, dtype: str) -> str:
    """The error message of a request with NaN or infinite logits. `dtype`: of weights and cache."""
    what = "NaN" if math.isnan(bad.value) else "infinite"
    if dtype == "float16":
        why = "float16 overflows in this model; use dtype='bfloat16' or 'float32', or check the weights"
    else:
        why = f"the model cannot be computed in {dtype}; check the checkpoint for weights that are NaN, infinite or very large"
    return f"logits at position {bad.position} are {what}: {why}"
