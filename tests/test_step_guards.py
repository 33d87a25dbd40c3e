"""What a decode step may cost, counted and not timed: uploads, waits for the device, ops, launches, bytes allocated.

The Triton path is run by the interpreter, in a process of its own: `TRITON_INTERPRET=1 pytest tests/test_step_guards.py`.
(Bytes moved: `stats()["attention"]["bytes_read"]` is held against the formula in `tests/test_bitwise_dense.py`.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_sparse.model.config import ModelConfig
from distributed_sparse.shard.attention import SparseAttention
from distributed_sparse.shard.inputs import StepInputs
from distributed_sparse.tools.planner.launches import DENSE_ATTENTION, LAYER, QK_NORM, STEP, layer_launches, step_launches
from distributed_sparse.tools.planner.rank import RankCostModel
from tests.support.aten_ops import OpRecorder, computes, new_tensors, storage_of, tensors_in
from tests.support.checkpoints import tiny_checkpoint
from tests.support.grids import corners
from tests.support.hash_weights import random_hash_weights
from tests.support.interpreter import INTERPRETED
from tests.support.kernels import error_ratio, poisoned_memory
from tests.support.methods import METHODS, sparse_settings
from tests.support.padded_shard import padded_shard
from tests.support.stepped_shard import SteppedShard
from tests.support.triton_path import triton_path

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
on_torch = pytest.mark.skipif(INTERPRETED, reason="the torch path")

CAPTURED = ["dense", *(method for method, case in METHODS.items() if case.captured)]
LONGEST = {"dense": 200, **{method: max(200, case.sparse_at) for method, case in METHODS.items()}}
"""Tokens of a context with sparse rows, where there are any."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "head_dim": 64,
    }
    folder = tmp_path_factory.mktemp("guards")
    random_hash_weights(folder / "hash.safetensors", range(3), 4, 64)
    return tiny_checkpoint(folder / "model", max_position_embeddings=16384, **sizes)


def sparse_of(path: Path, method: str, **changes: Any) -> dict[str, Any] | None:
    return sparse_settings(method, str(path.parent / "hash.safetensors"), **changes)


def stepped(
    path: Path, method: str, num_pages: int = 200, changes: dict[str, Any] | None = None, **config: Any
) -> SteppedShard:
    """The first layer is dense. `changes`: of the method's settings."""
    given = {"max_model_len": 1024, "max_num_seqs": 4, "max_num_batched_tokens": 4096, **config}
    return SteppedShard(path, num_pages, sparse=sparse_of(path, method, **(changes or {})), **given)


# ---- the Triton path: waits, uploads, ops, launches

WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal", "lift_fresh", "bincount")
"""Ops that read the device from the host, make a tensor of what the host holds, or have a shape that the device decides."""

READS = ("item", "tolist", "cpu", "__int__", "__float__", "__bool__", "__index__")
"""A tensor's methods by which the host reads it: on a CPU they run no op."""


class StepRecorder(OpRecorder):
    """Counts what a step asks of the device, in each layer's attention and outside of it.

    Attributes:
        launched: by section ("layer 0", ..., "rest"): what is launched, Triton kernels by name and torch's as "aten".
        waits: ops by which the host would wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.section = "rest"
        self.launched: dict[str, Counter[str]] = {}
        self.waits: list[str] = []

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        by_mask = any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices)
        if name in WAITS or by_mask:
            self.waits.append(f"{func} in {self.section}")
        if computes(func, args, kwargs, out):
            self.count("aten")

    def count(self, name: str) -> None:
        self.launched.setdefault(self.section, Counter())[name] += 1


@contextmanager
def recorded_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[StepRecorder]:
    """Inside, ops run by Triton where they have a Triton kernel, and all is recorded."""
    from triton.runtime.interpreter import GridExecutor

    recorder = StepRecorder()
    attention, launch = SparseAttention.__call__, GridExecutor.__call__

    def in_layer(self: SparseAttention, layer: int, *args: Any) -> Tensor:
        recorder.section = f"layer {layer}"
        try:
            return attention(self, layer, *args)
        finally:
            recorder.section = "rest"

    def launch_paused(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        recorder.count(self.fn.__name__)
        recorder.is_paused = True
        try:
            launch(self, *args, **kwargs)
        finally:
            recorder.is_paused = False

    def noted(name: str) -> Callable[..., Any]:
        read = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not recorder.is_paused:
                recorder.waits.append(f"{name} in {recorder.section}")
            return read(self, *args, **kwargs)

        return method

    with triton_path(monkeypatch), monkeypatch.context() as patch:
        patch.setattr(SparseAttention, "__call__", in_layer)
        patch.setattr(GridExecutor, "__call__", launch_paused)
        for name in READS:
            patch.setattr(Tensor, name, noted(name))
        with recorder:
            yield recorder


def written_down(engine: SteppedShard, path: Path) -> dict[str, Counter[str]]:
    """What `planner/launches.py` says that a greedy step launches, by section as in `StepRecorder`."""
    model, policies = ModelConfig.from_pretrained(path), engine.shard.policies
    expected, seen = {}, set()
    for layer, own in enumerate(policies):
        expected[f"layer {layer}"] = Counter(DENSE_ATTENTION) + layer_launches(own)
        if repr(own.config) not in seen:
            expected[f"layer {layer}"] += step_launches(own)
        seen.add(repr(own.config))
    of_layer = Counter(LAYER) + (Counter(QK_NORM) if model.qk_norm else Counter())
    expected["rest"] = sum([of_layer] * len(policies), Counter(STEP))
    return expected


def counted_uploads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of arrays with every upload from here on."""
    uploads: list[int] = []
    upload = StepInputs.upload

    def counted(self: StepInputs, arrays: Any) -> Any:
        uploads.append(len(arrays))
        return upload(self, arrays)

    monkeypatch.setattr(StepInputs, "upload", counted)
    return uploads


@interpreted
@pytest.mark.parametrize("method", CAPTURED)
def test_a_decode_step_uploads_once_waits_for_nothing_and_launches_what_is_written_down(
    path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = stepped(path, method)
    engine.start([LONGEST[method], 33, 48, 100])
    uploads = counted_uploads(monkeypatch)
    with recorded_step(monkeypatch) as recorder, no_host_tensors(monkeypatch), torch.inference_mode():
        plan = engine.decode_plan()
        assert plan.new_pages  # 48 tokens fill three pages: the deltas travel with the rest
        engine.shard.run(plan)
    assert len(uploads) == 1
    assert recorder.waits == []
    assert recorder.launched == written_down(engine, path), f"launched: {recorder.launched}"
    assert engine.shard.attention.rows[1] > 0 or method == "dense"
    paper = RankCostModel(ModelConfig.from_pretrained(path), 1, sparse_of(path, method), 16, torch.float32)
    planned = paper.dense_launches + paper.sparse_launches(LONGEST[method])
    assert planned == sum(map(Counter.total, recorder.launched.values())), "the planner adds them up"


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "twilight over everything": ("twilight", {"selector": "full"}),
    "vattention by its output": ("vattention", {"guarantee": "output"}),
    "vattention by both": ("vattention", {"guarantee": "numerator_denominator", "delta": 0.2}),
}
"""Settings that are planned with numbers of their own."""


@interpreted
@pytest.mark.parametrize("variant", corners(VARIANTS, kept=("twilight over everything",)))
def test_other_settings_launch_what_is_written_down_too(path: Path, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, changes = VARIANTS[variant]
    engine = stepped(path, method, changes=changes)
    engine.start([LONGEST[method], 48])
    with recorded_step(monkeypatch) as recorder, torch.inference_mode():
        engine.shard.run(engine.decode_plan())
    layer = written_down(engine, path)["layer 1"]
    assert recorder.launched["layer 1"] == layer, f"launched: {recorder.launched['layer 1']}"


@interpreted
@pytest.mark.parametrize(
    "method", corners(["quest", "twilight", "vattention", "window", "random"], kept=("quest", "vattention"))
)
def test_what_depends_on_the_batch_alone_is_made_by_the_first_of_the_sparse_layers(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64}
    path = tiny_checkpoint(tmp_path, head_dim=64, max_position_embeddings=1024, **sizes)
    engine = stepped(path, method)
    engine.start([LONGEST[method], 48])
    with recorded_step(monkeypatch) as recorder, torch.inference_mode():
        engine.shard.run(engine.decode_plan())
    first, second = (recorder.launched[f"layer {layer}"] for layer in (1, 2))
    policy = engine.shard.policies[2]
    assert first - second == +step_launches(policy), f"only the first launches {first - second}"
    assert second == Counter(DENSE_ATTENTION) + layer_launches(policy), f"launched: {second}"


@interpreted
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_layer_and_the_rest_of_a_step_launch_what_is_written_down_of_each(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three layers, beside the two of the tests above: so one is told from the other."""
    sizes: dict[str, Any] = {"num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 64}
    path = tiny_checkpoint(tmp_path, family, head_dim=64, max_position_embeddings=1024, **sizes)
    engine = stepped(path, "dense")
    engine.start([32, 20])  # two pages are full: the next step has a new one to tell
    with recorded_step(monkeypatch) as recorder, torch.inference_mode():
        engine.shard.run(engine.decode_plan())
    assert recorder.launched == written_down(engine, path), f"launched: {recorder.launched}"


@interpreted
@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01},
        {"suppressed": [3, 4], "suppress_until": 10000},
    ],
    ids=["temperature", "masks", "suppressed"],
)
def test_sampling_uploads_with_the_rest_and_waits_for_nothing(
    path: Path, sampling: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a greedy sequence, so that rows are told apart on the device."""
    engine = stepped(path, "dense")
    engine.start([30, 40], **sampling)
    engine.start([20], first_slot=2)
    uploads = counted_uploads(monkeypatch)
    with recorded_step(monkeypatch) as recorder, no_host_tensors(monkeypatch), torch.inference_mode():
        engine.shard.run(engine.decode_plan())
    assert len(uploads) == 1 and recorder.waits == []


def keeping(logits: Callable[[Tensor], Tensor], kept: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function, whose results are kept."""

    def kept_logits(rows: Tensor) -> Tensor:
        kept.append(logits(rows))
        return kept[-1]

    return kept_logits


@interpreted
@pytest.mark.parametrize("method", corners(CAPTURED, kept=("quest",)))
def test_rows_that_pad_a_captured_shape_are_nobodys_to_every_kernel(
    path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sequences in a shape of four, at the widths of the longest context: the logits of steps of their own shape.

    A row that pads has no page and no context; what is allocated is full of NaN, so that whatever is read of it shows, and so
    are the pages of the padded one before they are given out, the null page too.
    """
    own, padded = stepped(path, method), stepped(path, method, make_shard=padded_shard)
    found = []
    fill_pages(padded)
    for engine in (own, padded):
        engine.start([LONGEST[method], 33, 48])
        logits = engine.shard.model.logits
        kept: list[Tensor] = []
        monkeypatch.setattr(engine.shard.model, "logits", keeping(logits, kept))
        with recorded_step(monkeypatch) as recorder, poisoned_memory(), torch.inference_mode():
            _, on_device = engine.shard.run(engine.decode_plan())
        assert recorder.waits == []
        found.append(
            (kept[0][:3], on_device["tokens"].tolist(), engine.shard.attention.rows, engine.shard.attention.bytes_read)
        )
    assert kept[0].shape[0] == 4
    assert error_ratio(found[1][0], found[0][0]) < 1e-5
    assert found[1][1:] == found[0][1:]


@torch.inference_mode()
def fill_pages(engine: SteppedShard) -> None:
    """Fill the whole cache with what a sequence of NaN leaves behind: NaN, and the largest codes."""
    for layer in engine.shard.cache.layers:
        for tensor in layer.pages:
            tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)


@on_torch
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", ["dense", *METHODS])
def test_what_pages_held_before_they_were_given_out_changes_no_bit(
    path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request whose keys are NaN leaves them behind in pages that others get, and so may a warm-up in the null page."""
    found = []
    for is_filled in (False, True):
        engine = stepped(path, method)
        if is_filled:
            fill_pages(engine)
        kept: list[Tensor] = []
        monkeypatch.setattr(engine.shard.model, "logits", keeping(engine.shard.model.logits, kept))
        engine.start([LONGEST[method], 33, 47])
        for _ in range(4):  # over the end of a page
            engine.decode()
        found.append(torch.cat(kept))
        assert engine.shard.attention.rows[1] > 0 or method == "dense"
    assert found[0].isfinite().all() and torch.equal(found[0], found[1])


@contextmanager
def no_host_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, no tensor is made of what the host holds: on a GPU each would be a copy that is waited for."""
    as_tensor = torch.as_tensor

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("a tensor is made of host data within a step")

    def of_tensors_alone(x: Any, *args: Any, **kwargs: Any) -> Tensor:
        return as_tensor(x, *args, **kwargs) if isinstance(x, Tensor) else refuse()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", refuse)
        patch.setattr(torch, "from_numpy", refuse)
        patch.setattr(torch, "as_tensor", of_tensors_alone)
        yield


@interpreted
def test_the_guard_sees_a_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a clean step is clean says nothing unless a dirty one is caught."""
    engine = stepped(path, "dense")
    engine.start([30, 40])
    apply = engine.shard._apply

    def reads_back(views: Any) -> None:
        apply(views)
        assert int(views["context_lens"].sum()) > 0
        views["positions"][views["positions"] > 5].sum()

    monkeypatch.setattr(engine.shard, "_apply", reads_back)
    with recorded_step(monkeypatch) as recorder, torch.inference_mode():
        engine.shard.run(engine.decode_plan())
    assert recorder.waits[:2] == ["__int__ in rest", "aten.index.Tensor in rest"]


# ---- the torch path: allocations


class AllocationRecorder(OpRecorder):
    """Bytes of every storage that an op makes.

    Attributes:
        sizes: one per storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        made = tensors_in(out)
        new = {storage_of(made[place]): made[place] for place in new_tensors(args, kwargs, out)}
        self.sizes += [tensor.untyped_storage().nbytes() for tensor in new.values()]


def allocated(engine: SteppedShard) -> list[int]:
    """Bytes of each allocation of one decode step."""
    engine.decode()
    recorder = AllocationRecorder()
    plan = engine.decode_plan()
    with recorder:
        engine.shard.step(plan)
    return recorder.sizes


BYTES_PER_TOKEN = {"dense": 32, "quest": 64, "twilight": 600, "vattention": 80}
"""By which a step's allocations may grow with each token of context, over its two layers; keys and values would be 2048.

A row's list of pages and their scores; for twilight, of every second token its estimate for each of four query heads too, and
its place among the others of its row.
"""


@on_torch
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", BYTES_PER_TOKEN)
def test_a_decode_steps_allocations_hardly_grow_with_the_context(path: Path, method: str) -> None:
    """Lists of a row grow, an index or a score for each page or token of it; nothing grows like keys and values."""
    found = {}
    for length in (1000, 4000):
        engine = stepped(path, method, num_pages=8192, max_model_len=8192, max_num_batched_tokens=8192)
        layer_bytes = engine.shard.cache.layers[0].k_pages.nbytes
        engine.start([length, length])
        found[length] = allocated(engine)
        engine.close()
    grown = (sum(found[4000]) - sum(found[1000])) / (2 * 3000)
    assert 0 < grown < BYTES_PER_TOKEN[method], f"{grown:.1f} bytes per token of context"
    assert sum(found[4000]) < layer_bytes / 2, "in all, far less than the keys of one layer"
