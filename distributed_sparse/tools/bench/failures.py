"""failures: a failed contestant is reported in its row, and the others continue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distributed_sparse.tools.bench.accuracy import WrongResult
from distributed_sparse.tools.bench.timing import Unavailable, one_line


@contextmanager
def caught(name: str, is_peer: bool = False) -> Iterator[dict[str, str]]:
    """Yields a dict for the row of `name`: empty, or with "unavailable" or "wrong" once something inside has failed.

    "unavailable" is for what cannot be measured here, insufficient memory, and any failure of a peer, in one line. "wrong" is
    for a wrong result and any failure of this project's own code; the benchmark's exit code is then 1.
    """
    failed: dict[str, str] = {}
    try:
        yield failed
    except WrongResult as error:
        failed["wrong"] = str(error)
    except Unavailable as reason:
        failed["unavailable"] = str(reason)
    except Exception as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
        if is_memory:
            failed["unavailable"] = f"out of memory: {(str(error).splitlines() or [''])[0]}"
        elif is_peer:
            failed["unavailable"] = f"{name} failed: {one_line(error)}"
        else:
            failed["wrong"] = f"{name} failed: {type(error).__name__}: {error}"
