"""LayerCache: what the cache keeps beside K and V is the same, whoever rotates the keys, and costs only those who need it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from distributed_sparse import cache as metadata
from distributed_sparse.cache import AppendRuns, Geometry, LayerCache, Metadata, PageMinMax, QuantizedKeys
from distributed_sparse.kernels.cache import append
from distributed_sparse.kernels.cache.append_torch import rotate
from distributed_sparse.selection.hash import KeySignatures
from distributed_sparse.selection.tova import Visible
from tests.support.hash_weights import random_hash_weights

GEOMETRY = Geometry(2, 2, 64, 16, torch.float32, torch.device("cpu"), first_kv_head=0, model_kv_heads=2)
RUNS = AppendRuns(*(torch.tensor(column, dtype=torch.int32) for column in ([3, 5, 4], [0, 4, 5], [12, 3, 0], [4, 1, 7])))


class OwnKeys(Metadata):
    """What a method from outside may ask for: a copy of the newest step's keys."""

    def allocate(self, num_pages: int, geometry: Geometry) -> dict[str, Tensor]:
        return {"newest": torch.zeros(num_pages, 1)}

    def append(self, cache: LayerCache, k: Tensor, runs: AppendRuns) -> None:
        cache.constants["keys"] = k.clone()


@pytest.fixture
def kinds(tmp_path: Path) -> dict[str, tuple[Metadata, ...]]:
    weights = random_hash_weights(tmp_path / "hash.safetensors", range(1), 4, 64)
    return {
        "nothing": (),
        "kernel": (PageMinMax(), QuantizedKeys(bits=4)),
        "signatures": (KeySignatures(weights, 32),),
        "visible": (Visible(),),
        "all": (PageMinMax(), QuantizedKeys(bits=2), KeySignatures(weights, 32), Visible(), OwnKeys()),
    }


@pytest.mark.parametrize("name", ["nothing", "kernel", "signatures", "visible", "all"])
def test_a_rotated_append_keeps_what_an_append_of_rotated_keys_keeps(kinds: dict[str, tuple[Metadata, ...]], name: str) -> None:
    torch.manual_seed(0)
    together, apart = (LayerCache.allocate(0, 6, GEOMETRY, kinds[name]) for _ in range(2))
    q, k, v = torch.randn(12, 4, 64), torch.randn(12, 2, 64), torch.randn(12, 2, 64)
    angle = 3 * torch.randn(12, 32)
    cos, sin = angle.cos(), angle.sin()
    rotated = together.rotary_append(q, k, v, cos, sin, RUNS)
    apart.append(rotate(k, cos, sin), v, RUNS)
    assert torch.equal(rotated, rotate(q, cos, sin))
    for found, expected in zip(together.pages, apart.pages, strict=True):
        assert torch.equal(found, expected)
    if name == "all":
        assert torch.equal(together.constants["keys"], rotate(k, cos, sin))


@pytest.mark.parametrize(
    ("name", "wanted"), [("nothing", False), ("kernel", False), ("signatures", True), ("visible", True), ("all", True)]
)
def test_rotated_keys_are_written_out_only_for_metadata_that_appends_itself(
    kinds: dict[str, tuple[Metadata, ...]], name: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def spy(*args, return_keys: bool, **kept):
        asked.append(return_keys)
        return append.rotary_append(*args, return_keys=return_keys, **kept)

    monkeypatch.setattr(metadata, "rotary_append", spy)
    batch = torch.randn(12, 2, 64)
    angle = torch.zeros(12, 32)
    LayerCache.allocate(0, 6, GEOMETRY, kinds[name]).rotary_append(batch, batch, batch, angle, angle, RUNS)
    assert asked == [wanted]
