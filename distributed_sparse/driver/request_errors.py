"""request_errors: why one request ends while the engine goes on, in words for the user."""

from __future__ import annotations

import logging
import math

from distributed_sparse.protocol.step import BadLogits
from distributed_sparse.ranks.base import ShardFailure

logger = logging.getLogger(__name__)

NOT_OF_A_REQUEST = (ShardFailure, KeyboardInterrupt, SystemExit, GeneratorExit)
"""What ends more than the request in whose processing it is raised. Anything else ends that request alone, BaseExceptions too:
a panic inside the `tokenizers` library is one."""


def engine_error(raised: BaseException, request_id: str) -> str:
    """The error of a request that ends because something was raised while it was worked on; logged with its traceback."""
    logger.error("request %r ends, since the engine failed on it", request_id, exc_info=raised)
    return f"the engine failed on this request alone: {type(raised).__name__}: {raised}"


def bad_logits_error(bad: BadLogits, dtype: str) -> str:
    """The error of a request whose logits are no numbers; `dtype`: of weights and cache."""
    what = "NaN" if math.isnan(bad.value) else "infinite"
    if dtype == "float16":
        why = "float16 overflows in this model; use dtype='bfloat16' or 'float32', or check the weights"
    else:
        why = f"the model cannot be computed in {dtype}; check the checkpoint for weights that are NaN, infinite or very large"
    return f"logits at position {bad.position} are {what}: {why}"
