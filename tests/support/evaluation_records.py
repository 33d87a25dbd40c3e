"""answers_record and trace_record: units of an evaluation as `results.jsonl` holds them, with numbers that a test chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distributed_sparse.tools.evaluation.methods import settings_key


def answers_record(
    settings: dict[str, Any],
    scores: Sequence[float],
    attended: int,
    *,
    group: str = "g",
    context: int = 100,
    layers: Sequence[int] = (1,),
    tasks: Sequence[str | None] = (),
    kl: Sequence[float | None] = (0.5, 0.25),
    top1: Sequence[bool] = (True, False),
    needed: float | None = None,
    bytes_read: int = 1000,
) -> dict[str, Any]:
    """Two layers of two KV heads, one decode step per example; layers outside `layers` attend the whole context."""
    steps = len(scores)
    of_layer = [[(attended if layer in layers else context) * steps] * 2 for layer in range(2)]
    examples = [
        {
            "id": f"e{i}",
            "task": tasks[i] if tasks else None,
            "depth": None,
            "scores": {"score": score},
            "token_ids": [1],
            "num_question_tokens": 2 + i,
            "pages": 7 + i,
            "kl": list(kl),
            "top1": list(top1),
            "needed": needed,
        }
        for i, score in enumerate(scores)
    ]
    return _record(settings, "answers", group, layers) | {
        "examples": examples,
        "counters": {
            "steps": steps,
            "context": context * steps,
            "attended": of_layer,
            "rows_sparse": 0 if attended == context else steps * 2 * len(layers),
            "bytes_read": bytes_read * steps,
        },
        "page_bytes": {"kv": 64.0, "metadata": 4.0},
    }


def trace_record(
    settings: dict[str, Any],
    mass: float,
    error: float | None,
    *,
    group: str = "g",
    layers: Sequence[int] = (1,),
    tokens: Sequence[int] = (5, 10, 20, 30),
    attended: int = 16,
) -> dict[str, Any]:
    """One step at position 99, two layers, four query heads; the first layer is dense."""
    trace = {
        "positions": [99],
        "captured_mass": [[[1.0] * 4, [mass] * 4]],
        "relative_error": [[[0.0] * 4, [error] * 4]],
        "entropy": [[[1.0, 2.0, 3.0, 4.0]] * 2],
        "tokens_for_mass": [[[list(tokens)] * 4, [[2 * count for count in tokens]] * 4]],
        "attended": [[[100, 100], [attended, attended]]],
        "overlap": {kind: {"jaccard": [[0.25] * 2] * 2, "kept": [[0.5] * 2] * 2} for kind in ("tokens", "pages")},
    }
    return _record(settings, "trace", group, layers) | {"example": "e0", "trace": trace}


def _record(settings: dict[str, Any], kind: str, group: str, layers: Sequence[int]) -> dict[str, Any]:
    run = settings_key(settings)
    return {
        "key": f"{run}/{kind}/{group}/0",
        "kind": kind,
        "run": run,
        "settings": settings,
        "group": group,
        "selecting_layers": list(layers),
    }
