"""failures: error messages about ranks that failed, refused to start, or differ from each other."""

from __future__ import annotations

from collections.abc import Mapping

from distributed_sparse.protocol.step import Failed, Hello, Loaded
from distributed_sparse.ranks.base import ShardFailure


def describe(reasons: Mapping[int, str | Failed], hellos: dict[int, Hello]) -> ShardFailure:
    """Combine what is known about each failed rank into one ShardFailure.

    A rank whose collective merely broke off is not a cause, unless no other rank has failed.
    """

    def consequence(what: str | Failed) -> bool:
        return isinstance(what, Failed) and what.waits

    root = {rank: what for rank, what in sorted(reasons.items()) if not consequence(what)} or dict(sorted(reasons.items()))
    texts, traceback = [], ""
    for rank, what in root.items():
        if isinstance(what, Failed):
            traceback = traceback or ("" if what.waits else what.traceback)
            texts.append(f"{place(rank, hellos)} failed: {what.error}")
        else:
            texts.append(f"{place(rank, hellos)} {what}")
    return ShardFailure(tuple(root), "; ".join(texts) or "the shards have been stopped", traceback)


def refusal_of(
    failure: ShardFailure, reasons: Mapping[int, str | Failed], world_size: int, hellos: dict[int, Hello]
) -> ValueError | None:
    """If all failed ranks raised ValueErrors, which the user can fix, the first as a ValueError; else None."""
    prefix = "ValueError: "
    errors = {rank: what.error for rank in failure.ranks if isinstance(what := reasons.get(rank), Failed)}
    if not errors or len(errors) < len(failure.ranks) or not all(error.startswith(prefix) for error in errors.values()):
        return None
    rank, error = next(iter(errors.items()))
    text = error.removeprefix(prefix)
    everyone = len(errors) == world_size and len(set(errors.values())) == 1
    return ValueError(text if everyone else f"{place(rank, hellos)}: {text}")


def place(rank: int, hellos: dict[int, Hello]) -> str:
    """A rank with its node, host and pid, for messages."""
    hello = hellos.get(rank)
    return f"rank {rank} (node {hello.node_id}, host {hello.hostname}, pid {hello.pid})" if hello else f"rank {rank}"


def refuse_unequal(hellos: dict[int, Hello]) -> None:
    """Check that all ranks have the same package versions and weights.

    Raises:
        ValueError: names two ranks that differ, and both values.
    """
    first = hellos[0]
    for rank, hello in sorted(hellos.items()):
        for name in sorted(first.versions.keys() | hello.versions.keys()):
            mine, other = first.versions.get(name, "not installed"), hello.versions.get(name, "not installed")
            if mine != other:
                raise ValueError(
                    f"{place(0, hellos)} has {name} {mine}, but {place(rank, hellos)} has {name} {other}; "
                    f"install the same {name} on every node"
                )
        if hello.weights_fingerprint != first.weights_fingerprint:
            raise ValueError(
                f"{place(0, hellos)} and {place(rank, hellos)} hold different weights (fingerprints "
                f"{first.weights_fingerprint[:12]} and {hello.weights_fingerprint[:12]}); put the same checkpoint on every node"
            )


def refuse_unequal_methods(loaded: list[Loaded], hellos: dict[int, Hello]) -> None:
    """Check that the ranks' methods agree on which pages are freed and shared, since one allocator serves all ranks.

    Raises:
        ValueError: names two ranks that differ, and both values.
    """
    first = loaded[0]
    for message in loaded:
        for name in ("evict_window", "copy_on_fork"):
            mine, other = getattr(first, name), getattr(message, name)
            if mine != other:
                raise ValueError(
                    f"{place(0, hellos)} has {name}={mine}, but {place(message.rank, hellos)} has {name}={other}; "
                    "install the same sparse method on every node"
                )
