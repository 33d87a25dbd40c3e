"""Selectors: the predictors that Twilight and vAttention build on, by name."""

from __future__ import annotations

from distributed_sparse.selection.hash import HashPredictor
from distributed_sparse.selection.metadata import Geometry
from distributed_sparse.selection.oracle import OraclePredictor
from distributed_sparse.selection.predictor import Predictor
from distributed_sparse.selection.quest import QuestPredictor
from distributed_sparse.selection.sketch import SketchPredictor

_PREDICTORS: dict[str, type[Predictor]] = {
    "quest": QuestPredictor,
    "sketch": SketchPredictor,
    "hash": HashPredictor,
    "oracle": OraclePredictor,
}

SELECTORS = tuple(_PREDICTORS)


def is_per_token(name: str) -> bool:
    """Whether the predictor of a name in `SELECTORS` scores single tokens, and not pages."""
    return _PREDICTORS[name].per_token


def make_selector(name: str, geometry: Geometry, hash_weights: str | None) -> Predictor:
    """The predictor of a name in `SELECTORS`."""
    if name == "hash":
        return HashPredictor(geometry, hash_weights)
    return _PREDICTORS[name](geometry)
