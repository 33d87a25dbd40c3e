"""The hash scorer reads the tokens of the best agreeing signatures; its networks come from a file, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distributed_sparse.cache import AppendRuns
from distributed_sparse.selection import resolve_sparse_config
from distributed_sparse.selection.base import Policy, dense_selection
from distributed_sparse.selection.hash import HashConfig, HashPolicy
from tests.support.checkpoints import tiny_checkpoint
from tests.support.decode_rows import DecodeRows, positions_read, rows_for
from tests.support.eager_methods import EagerTopK
from tests.support.engine import make_llm
from tests.support.hash_weights import random_hash_weights
from tests.support.promise_a import assert_rows_depend_on_themselves

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.each_value]  # on CPU, equal bits are promised at one thread

CONTEXTS = [333, 5, 64, 65, 17, 200, 1, 700]


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """Of three layers of 8 query heads of 64 channels."""
    return random_hash_weights(tmp_path / "hash.safetensors", range(3), 8, 64)


def hashed(rows: DecodeRows, config: HashConfig) -> Policy:
    return rows.policy(HashPolicy, config)


@pytest.mark.parametrize(
    "settings",
    [
        {"token_budget": 64},
        {"token_budget": 50},
        {"token_budget": 32, "recent_pages": 1},
        {"token_budget": 160, "sink_pages": 0},
        {"token_budget": 160, "sink_pages": 3, "recent_pages": 4},
        {"token_budget": 64, "min_context": 66},
    ],
)
@pytest.mark.parametrize(("group", "bits", "layer"), [(1, 32, 0), (2, 32, 2), (4, 96, 1)])
def test_tokens_are_those_of_the_definition_in_float64(
    tmp_path: Path, settings: dict[str, Any], group: int, bits: int, layer: int
) -> None:
    path = random_hash_weights(tmp_path / "hash.safetensors", range(3), 4 * group, 64, bits=bits, hidden=40)
    config = HashConfig(**settings, hash_weights=path)
    rows = rows_for(HashPolicy, config, CONTEXTS, group=group, layer=layer)
    selection = rows.select(hashed(rows, config))
    own, sparse = EagerTopK(dense_layers=0, selector="hash", hash_weights=path, **settings), 0
    for row, n in enumerate(CONTEXTS):
        expected = own.log_weights(layer, rows.q[row], rows.keys[row], rows.values[row])[::group]
        for head in range(4):
            found = positions_read(rows, selection, row, head)
            assert found == expected[head].isfinite().nonzero()[:, 0].tolist()
            sparse += len(found) < n
    own.margins.assert_clear(signature=1e-12)
    assert sparse >= 12


def test_equal_signatures_go_to_the_lower_position(tmp_path: Path, weights: str) -> None:
    """Networks that answer the same for every key: sinks, the lowest positions, and the newest tokens."""
    tensors = {
        name: torch.zeros_like(tensor) if "k.2.weight" in name else tensor for name, tensor in load_file(weights).items()
    }
    path = str(tmp_path / "constant.safetensors")
    save_file(tensors, path)
    config = HashConfig(token_budget=64, hash_weights=path)
    rows = rows_for(HashPolicy, config, [333])
    selection = rows.select(hashed(rows, config))
    for head in range(4):
        assert positions_read(rows, selection, 0, head) == [*range(32), *range(333 - 32, 333)]


def test_a_key_is_hashed_the_same_in_any_append(weights: str) -> None:
    """Token by token, as decode writes it, and all at once, as prefill does."""
    config = HashConfig(token_budget=64, hash_weights=weights)
    rows = rows_for(HashPolicy, config, [40], layer=1)
    written = rows.cache.metadata["key_signatures"].clone()
    rows.cache.metadata["key_signatures"].zero_()
    for i in range(40):
        page = rows.batch.page_table[0, i // 16 : i // 16 + 1]
        runs = AppendRuns(page, torch.tensor([0]), torch.tensor([i % 16]), torch.tensor([1]))
        key, value = (kept[0][:, i : i + 1].transpose(0, 1) for kept in (rows.keys, rows.values))
        rows.cache.append(
            key, value, AppendRuns(*(part.int() for part in (runs.pages, runs.starts, runs.offsets, runs.counts)))
        )
    assert torch.equal(rows.cache.metadata["key_signatures"], written)
    assert written[rows.batch.page_table[0, 0].long()].unique().numel() > 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_itself_alone(weights: str, dtype: torch.dtype) -> None:
    config = HashConfig(token_budget=64, min_context=66, hash_weights=weights)
    rows = rows_for(HashPolicy, config, CONTEXTS, dtype=dtype, layer=2)
    assert_rows_depend_on_themselves(rows, lambda some: hashed(some, config))


def test_a_covered_row_is_bitwise_dense_beside_rows_that_are_not(weights: str) -> None:
    config = HashConfig(token_budget=64, hash_weights=weights)
    rows = rows_for(HashPolicy, config, CONTEXTS)
    found = rows.attend(rows.select(hashed(rows, config)))
    dense = rows.attend(dense_selection(rows.batch, 4))
    for row, n in enumerate(CONTEXTS):
        assert torch.equal(found[row], dense[row]) == (n <= 64)


# ---- the file


@pytest.mark.parametrize(
    "sparse",
    [
        {"method": "hash"},
        {"method": "twilight", "selector": "hash"},
        {"method": "vattention", "selector": "hash"},
        {"method": "twilight", "layers": [{"range": "2", "selector": "hash"}]},
    ],
)
def test_the_hash_is_refused_without_weights(sparse: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"needs learned weights: set sparse.hash_weights to a safetensors file"):
        resolve_sparse_config(sparse)


def changed(weights: str, change: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """The file's tensors, some replaced or left out."""
    tensors = load_file(weights) | {name: tensor for name, tensor in change.items() if tensor is not None}
    return {name: tensor for name, tensor in tensors.items() if change.get(name, tensor) is not None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "is not a readable safetensors file"),
        ({"model.layers.1.hash.q.0.bias": None}, "has no tensor 'model.layers.1.hash.q.0.bias'; docs/methods describes"),
        (
            {"model.layers.1.hash.k.2.weight": torch.zeros(8, 64, 24)},
            r"k.2.weight' .* has shape \[8, 64, 24\], but this model needs \[8, 32, 24\]",
        ),
        ({"model.layers.1.hash.k.1.weight": torch.zeros(8, 24, 5)}, r"k.1.weight' .* \[8, 24, 5\], but .* \[8, 24, 24\]"),
        ({"model.layers.1.hash.q.0.weight": torch.zeros(4, 24, 64)}, r"q.0.weight' .* \[4, 24, 64\], but .* \[8, 24, 64\]"),
        ({"model.layers.1.hash.q.0.bias": torch.zeros(16, 24)}, r"q.0.bias' .* \[16, 24\], but .* \[8, 'any'\]; is it another"),
    ],
)
def test_a_wrong_file_is_refused_by_what_is_wrong_in_it(
    tmp_path: Path, weights: str, change: dict[str, Tensor | None] | None, message: str
) -> None:
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(b"no safetensors")
    if change is not None:
        save_file(changed(weights, change), path)
    config = HashConfig(hash_weights=str(path))
    with pytest.raises(ValueError, match=message):
        rows_for(HashPolicy, config, [20], layer=1)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (48, "has signatures of 48 bits; use a multiple of 32"),
        (0, "holds no hash; docs/methods/hash.md describes its layout"),
    ],
)
def test_a_file_without_whole_words_of_signature_is_refused(tmp_path: Path, bits: int, message: str) -> None:
    path = str(tmp_path / "odd.safetensors")
    if bits:
        random_hash_weights(Path(path), range(1), 8, 64, bits=bits)
    else:
        save_file({"model.embed_tokens.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=message):
        rows_for(HashPolicy, HashConfig(hash_weights=path), [20])


def test_an_engine_names_the_file_that_it_cannot_read(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path / "model")
    sparse = {"method": "hash", "hash_weights": str(tmp_path / "absent.safetensors")}
    with pytest.raises(ValueError, match=r"absent.safetensors' is not a readable safetensors file"):
        make_llm(path, sparse=sparse)


def test_bytes_scored_are_those_of_the_signatures(tmp_path: Path, weights: str) -> None:
    config = HashConfig(hash_weights=weights)
    rows = rows_for(HashPolicy, config, [20])
    assert hashed(rows, config).bytes_scored([100, 33]) == 133 * 4 * 2 * 4  # KV heads, group, one word each
    wide = HashConfig(hash_weights=random_hash_weights(tmp_path / "wide.safetensors", range(1), 8, 64, bits=96))
    assert hashed(rows_for(HashPolicy, wide, [20]), wide).bytes_scored([100]) == 100 * 4 * 2 * 12
