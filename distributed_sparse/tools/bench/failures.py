"""failures: what ends one contestant ends none of the others, and is told in its row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from distributed_sparse.tools.bench.accuracy import WrongResult
from distributed_sparse.tools.bench.timing import Unavailable, one_line, out_of_memory_is_unavailable


@contextmanager
def caught(name: str, is_peer: bool = False) -> Iterator[dict[str, str]]:
    """Yields what is put into a row of `name`: nothing, or, once something inside has failed, "unavailable" or "wrong".

    "unavailable" is what cannot be measured here, memory that does not suffice, and whatever ends a peer, in one line; "wrong"
    a wrong result, and whatever else ends what is this project's own: the benchmark's exit code is 1.
    """
    failed: dict[str, str] = {}
    try:
        with out_of_memory_is_unavailable():
            yield failed
    except WrongResult as error:
        failed["wrong"] = str(error)
    except Unavailable as reason:
        failed["unavailable"] = str(reason)
    except Exception as error:
        if is_peer:
            failed["unavailable"] = f"{name} failed: {one_line(error)}"
        else:
            failed["wrong"] = f"{name} failed: {type(error).__name__}: {error}"
