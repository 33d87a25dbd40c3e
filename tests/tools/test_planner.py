"""The planner says in advance what the engine counts, to the byte, and times follow from bytes as written down."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_sparse import SamplingParams
from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.sharding import ShardSpec
from distributed_sparse.model.weights import load_weights
from distributed_sparse.tools.bench import machine_rates as measure
from distributed_sparse.tools.bench.machine_rates import _links, large_message
from distributed_sparse.tools.bench.timing import Times
from distributed_sparse.tools.planner.hardware import PRESETS, Hardware, Interconnect, Protocol
from distributed_sparse.tools.planner.plan import Grid, memory, plan
from distributed_sparse.tools.planner.rank import RankCostModel
from distributed_sparse.tools.planner.times import expected, limit_s
from tests.support.checkpoints import CONFIGS, tiny_checkpoint
from tests.support.engine import make_llm
from tests.support.hash_weights import random_hash_weights

PROMPTS = (40, 150, 75)
STEPS = 4
CACHE_BYTES = 1 << 23
MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"

SETTLED: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense"},
    "quest": {"method": "quest", "token_budget": 64, "dense_layers": 1},
    "quest below min_context": {"method": "quest", "token_budget": 64, "dense_layers": 0, "min_context": 80},
    "quest with layers": {
        "method": "quest",
        "token_budget": 48,
        "dense_layers": 1,
        "layers": [{"range": "2", "token_budget": 96}],
    },
    "window": {"method": "window", "token_budget": 40, "dense_layers": 0},
    "evicting window": {"method": "window", "token_budget": 64, "dense_layers": 0, "evict": True},
    "random": {"method": "random", "token_budget": 64},
    "oracle_topk": {"method": "oracle_topk", "token_budget": 33, "dense_layers": 1},
    "hash": {"method": "hash", "token_budget": 48, "dense_layers": 1},
    "tova": {"method": "tova", "token_budget": 50, "dense_layers": 1},
    "covering quest": {"method": "quest", "token_budget": 512, "dense_layers": 0},
}
"""Methods whose settings alone say what is attended."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("planner") / "model")


@pytest.fixture(scope="module")
def hash_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    return random_hash_weights(tmp_path_factory.mktemp("hash") / "hash.safetensors", range(3), 8, 16)


def on_paper(path: Path, world_size: int, sparse: dict[str, Any] | None) -> RankCostModel:
    model = ModelConfig.from_pretrained(path)
    return RankCostModel(model, world_size, sparse, 16, model.dtype)


def decode(path: Path, world_size: int, sparse: dict[str, Any], prompts: tuple[int, ...], steps: int) -> list[dict[str, Any]]:
    """stats() after a prefill of the prompts together, and after the same prefill and so many decode steps."""
    tokens = [[3 + (7 * i + n) % 300 for i in range(n)] for n in prompts]
    with make_llm(path, world_size, max_num_batched_tokens=4096, kv_cache_memory_bytes=CACHE_BYTES, sparse=sparse) as llm:
        found = []
        for max_tokens in (1, steps + 1):
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
            llm.generate(tokens, params, use_tqdm=False)
            found.append(llm.stats())
    return found


def planned_reads(rank: RankCostModel, prompts: tuple[int, ...], steps: int, density: float | None = None) -> int:
    return sum(rank.attention([n + step for n in prompts], density).read for step in range(1, steps + 1))


def section(name: str, hash_weights: str) -> dict[str, Any]:
    return SETTLED[name] | ({"hash_weights": hash_weights} if name == "hash" else {})


@pytest.mark.parametrize("name", SETTLED)
def test_bytes_read_and_held_are_those_that_the_engine_counts(path: Path, hash_weights: str, name: str) -> None:
    sparse = section(name, hash_weights)
    rank = on_paper(path, 1, sparse)
    first, last = decode(path, 1, sparse, PROMPTS, STEPS)
    assert first["attention"]["bytes_read"] == 0
    assert last["attention"]["bytes_read"] == planned_reads(rank, PROMPTS, STEPS) > 0
    (held,) = last["ranks"]
    pages = CACHE_BYTES // sum(rank.page_bytes)
    assert (held["weight_bytes"], held["cache_bytes"], held["metadata_bytes"]) == (
        rank.weight_bytes,
        pages * rank.page_bytes[0],
        pages * rank.page_bytes[1],
    )
    sparse_rows = last["attention"]["rows_sparse"]
    assert (sparse_rows == 0) == (name in ("dense", "covering quest")), "the case must be what its name says"


def test_each_of_two_ranks_reads_holds_and_sends_what_was_planned(path: Path) -> None:
    sparse = SETTLED["quest with layers"]
    rank = on_paper(path, 2, sparse)
    first, last = decode(path, 2, sparse, PROMPTS, STEPS)
    assert last["attention"]["bytes_read"] == 2 * planned_reads(rank, PROMPTS, STEPS)
    assert [held["weight_bytes"] for held in last["ranks"]] == [rank.weight_bytes] * 2
    assert len({held["page_bytes"] for held in last["ranks"]} | {sum(rank.page_bytes)}) == 1
    # The second round runs the same prefill as the first one, and the decode steps.
    calls, num_bytes = (last["all_reduce"][key] - 2 * first["all_reduce"][key] for key in ("calls", "bytes"))
    assert calls == STEPS * rank.all_reduce_calls == STEPS * 7
    assert num_bytes == STEPS * rank.all_reduce_calls * rank.all_reduce_bytes_each(len(PROMPTS))


@pytest.mark.parametrize(
    ("sparse", "prompts"),
    [
        ({"method": "twilight", "p": 0.5, "min_candidates": 64, "dense_layers": 1, "min_context": 60}, PROMPTS),
        (
            {
                "method": "vattention",
                "guarantee": "denominator",
                "epsilon": 0.99,
                "delta": 0.9,
                "sink_tokens": 16,
                "window_tokens": 16,
                "top_k_fraction": 0.01,
                "dense_layers": 1,
            },
            (1400, 1100),
        ),
    ],
    ids=["twilight", "vattention"],
)
def test_with_the_measured_density_the_rest_of_an_adaptive_method_is_planned_exactly(
    tmp_path: Path, sparse: dict[str, Any], prompts: tuple[int, ...]
) -> None:
    path = tiny_checkpoint(tmp_path / "model", max_position_embeddings=2048)
    rank = on_paper(path, 1, sparse)
    _, last = decode(path, 1, sparse, prompts, STEPS)
    attention = last["attention"]
    contexts = [n + step for n in prompts for step in range(1, STEPS + 1)]
    settled = [n for n in contexts if n < sparse.get("min_context", 0)]
    open_ = sum(contexts) - sum(settled)
    of_layer = [sum(heads) / len(heads) for heads in attention["density"][1:]]
    density = (sum(of_layer) / len(of_layer) * sum(contexts) - sum(settled)) / open_
    assert density < 0.9 and attention["rows_sparse"] == 2 * 4 * (len(contexts) - len(settled)), "no open row may be dense"
    assert attention["bytes_read"] == pytest.approx(planned_reads(rank, prompts, STEPS, density), rel=1e-9)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_those_that_a_rank_holds(tmp_path: Path, family: str, world_size: int, tied: bool) -> None:
    folder = tiny_checkpoint(tmp_path / "model", family, tie_word_embeddings=tied)
    model = ModelConfig.from_pretrained(folder)
    rank = RankCostModel(model, world_size, None, 16, torch.bfloat16)
    for number in range(world_size):
        weights = load_weights(folder, model, ShardSpec(number, world_size), torch.bfloat16, "cpu")
        assert rank.weight_bytes == weights.nbytes
    # A step reads lm_head whole, and of the embedding a row per sequence, whether or not they are one tensor.
    table = 0 if tied else weights.embedding.nbytes
    assert rank.weight_bytes_read(5) == weights.nbytes - table + 5 * model.hidden_size * 2


def test_written_bytes_are_the_token_its_metadata_and_the_page_bounds_that_are_written_whole(path: Path) -> None:
    token = 3 * 4 * 2 * 16 * 4  # layers, KV heads, K and V, channels, float32
    assert on_paper(path, 1, None).attention([100]).written == token
    quest = {"method": "quest", "token_budget": 64, "dense_layers": 1}
    assert on_paper(path, 1, quest).attention([100]).written == token + 2 * 4 * 2 * 16 * 4
    twilight = {"method": "twilight", "selector": "full", "dense_layers": 2}
    assert on_paper(path, 1, twilight).attention([100, 50], 0.5).written == 2 * (token + 4 * (16 // 2 + 4))


def test_the_networks_of_hash_signatures_are_held_beside_the_cache(path: Path, hash_weights: str) -> None:
    rank = on_paper(path, 2, section("hash", hash_weights))
    of_head = (16 * 24 + 24) + (24 * 24 + 24) + (24 * 32 + 32)
    assert rank.constant_bytes == 2 * 4 * 2 * of_head * 8  # layers, this rank's query heads, q and k, float64
    assert on_paper(path, 2, None).constant_bytes == 0


# ---- Llama 3.1 8B on an H100


def test_the_limits_of_an_h100_are_those_that_the_bytes_of_llama_give() -> None:
    model = ModelConfig.from_pretrained(MODELS / "llama-3.1-8b")
    dense = RankCostModel(model, 1, None, 16, torch.bfloat16)
    quest = RankCostModel(model, 1, {"method": "quest", "token_budget": 2048, "dense_layers": 0}, 16, torch.bfloat16)
    assert dense.weight_bytes_read(1) / 1e9 == pytest.approx(15.0, abs=0.05)
    assert dense.attention([1]).read == 131072
    device = replace(PRESETS["h100"], bandwidth=3.0e12)
    limits = {
        32768: (1.24, 2.56, 3.55, 5.87),
        65536: (1.49, 3.90, 5.47, 8.49),
        131072: (1.97, 5.92, 7.95, 11.0),
    }
    for context, of_batches in limits.items():
        for batch, limit in zip((1, 8, 16, 64), of_batches):
            ratio = limit_s(dense, device, context, batch) / limit_s(quest, device, context, batch)
            assert ratio == pytest.approx(limit, abs=0.006 if limit < 10 else 0.06)
    attention_alone = [dense.attention([n]).read / quest.attention([n]).read for n in limits]
    assert attention_alone == pytest.approx([8.0, 10.7, 12.8], abs=0.05)


def test_as_many_sequences_fit_as_the_memory_holds_pages_for() -> None:
    model = ModelConfig.from_pretrained(MODELS / "llama-3.1-8b")
    rank = RankCostModel(model, 1, {"method": "quest"}, 16, torch.bfloat16)
    device, page = PRESETS["h100"], sum(rank.page_bytes)
    most = memory(rank, device, 32768, 1, 0.9).max_batch
    assert most == (72 * 10**9 - (2 << 30) - rank.weight_bytes - page) // (2048 * page) == 11
    assert memory(rank, device, 32768, most, 0.9).fits and not memory(rank, device, 32768, most + 1, 0.9).fits
    assert memory(rank, device, 32768, 1, 0.9).metadata_bytes == 2049 * 30 * 8 * 2 * 128 * 2  # 30 sparse layers
    crowded = memory(rank, replace(device, memory_bytes=16 * 10**9), 32768, 1, 0.9)
    assert not crowded.fits and crowded.max_batch == 0


def test_an_evicting_method_holds_its_window_alone(path: Path) -> None:
    rank = on_paper(path, 1, SETTLED["evicting window"])
    assert (rank.pages(30), rank.pages(64), rank.pages(400)) == (2, 4, 4)


# ---- times


def test_an_all_reduce_takes_the_fastest_protocol_of_a_ring() -> None:
    quick, wide = Protocol(1e-6, 1e-6, 0.25), Protocol(20e-6, 2e-6, 1.0)
    links = Interconnect(100e9, (quick, wide))
    assert links.all_reduce_s(1 << 30, 1) == links.all_gather_s(1 << 30, 1) == links.broadcast_s(8, 1) == 0.0
    assert links.all_reduce_s(1000, 4) == pytest.approx(1e-6 + 6e-6 + 1.5 * 1000 / 25e9)
    assert links.all_reduce_s(10**9, 4) == pytest.approx(20e-6 + 12e-6 + 1.5 * 10**9 / 100e9)
    assert links.all_gather_s(10**9, 4) == pytest.approx(20e-6 + 6e-6 + 3 * 10**9 / 100e9)


def test_expected_time_is_bytes_kernels_collectives_and_the_driver(path: Path) -> None:
    sparse = SETTLED["quest"]
    rank = on_paper(path, 2, sparse)
    links = Interconnect(1e9, (Protocol(1e-5, 0.0, 1.0),))
    device = replace(PRESETS["h100"], links=links, bandwidth=1e9, flops_32=1e15, driver_s=3e-4)
    device = replace(device, kernel_s=1e-6, graph_gap_s=3e-6, graph_launch_s=2e-5)
    found = expected(rank, device, 200, 3)
    attention = rank.attention([200] * 3)
    assert found.weights_s == pytest.approx(rank.weight_bytes_read(3) / 0.85e9)
    assert found.attention_s == pytest.approx(attention.dense_kv / 0.85e9 + attention.sparse_kv / 0.77e9)
    assert found.select_s == pytest.approx(attention.scored / 0.77e9)
    kernels = 3 * 11 + 22 + 2 * 3 + 1  # three layers, the rest of a step, what two layers of Quest launch more, each and once
    assert found.kernels_s == pytest.approx(2e-5 + 3e-6 * kernels)
    assert expected(rank, device, 200, 3, enforce_eager=True).kernels_s == pytest.approx(1e-6 * kernels)
    assert found.all_reduce_s == pytest.approx(7 * (1e-5 + 3 * 64 * 4 / 1e9))
    assert found.gather_s == pytest.approx(2e-5 + (3 * 166 * 4 + 24) / 1e9)  # 331 rows of lm_head over two ranks
    parts = (found.weights_s, found.attention_s, found.select_s, found.kernels_s, found.all_reduce_s, found.gather_s, 3e-4)
    assert found.total_s == pytest.approx(sum(parts))
    slow = expected(rank, replace(device, flops_32=1e6), 200, 3)
    assert slow.weights_s == pytest.approx(2 * rank.matrix_elements * 3 / 0.6e6), "matrices take at least their operations"
    assert limit_s(rank, device, 200, 3) == pytest.approx((rank.weight_bytes_read(3) + attention.read) / 1e9)


def test_kernels_are_launched_one_by_one_where_the_engine_captures_nothing(path: Path) -> None:
    """A method that reads the device on the host; a CPU, whose rates of attention hold a selection's small operations."""
    device = replace(PRESETS["h100"], kernel_s=6e-6)
    oracle = on_paper(path, 1, SETTLED["oracle_topk"])
    assert expected(oracle, device, 200, 1).kernels_s == pytest.approx(6e-6 * (3 * 11 + 22 + 2))
    quest, machine = on_paper(path, 1, SETTLED["quest"]), replace(device, measured=True)
    assert expected(quest, machine, 200, 1).kernels_s == pytest.approx(6e-6 * (3 * 11 + 22))


def test_a_layer_that_the_host_knows_to_be_dense_launches_nothing_more(path: Path) -> None:
    rank = on_paper(path, 1, SETTLED["quest with layers"])
    assert [rank.sparse_launches(context) for context in (40, 90, 200)] == [0, 4, 8]


def losses(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["pays"] is False]


def test_a_method_whose_kernels_cost_more_than_its_bytes_save_does_not_pay(path: Path) -> None:
    model, grid = (
        ModelConfig.from_pretrained(path),
        Grid(contexts=(128, 512), sparse=({"method": "quest", "token_budget": 64},)),
    )
    device = PRESETS["h100"]
    rows = plan(model, torch.float32, grid, lambda ranks: [device] * len(ranks))
    assert [row["method"] for row in rows] == ["dense", "quest"] * 2
    assert [row["context"] for row in losses(rows)] == [128, 512], "a few KB do not pay for a kernel"
    free = replace(device, kernel_s=0.0, bandwidth=1e6)
    rows = plan(model, torch.float32, grid, lambda ranks: [free] * len(ranks))
    assert losses(rows) == [] and all(row["tpot_speedup"] > 1 for row in rows if row["method"] == "quest")
    assert [row["pays"] for row in rows if row["method"] == "dense"] == [None, None]


def test_presets_are_whole() -> None:
    for device in PRESETS.values():
        assert device.bandwidth > 5e11 and device.memory_bytes >= 24e9 and device.flops_16 > device.flops_32 > 1e13
        assert device.links.all_reduce_s(8192, 8) > device.links.all_reduce_s(8192, 2) > 0


# ---- errors


def test_what_cannot_be_planned_is_refused_by_name(path: Path) -> None:
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not divide num_key_value_heads=4; use 1, 2 or 4"):
        on_paper(path, 3, None)
    twilight = on_paper(path, 1, {"method": "twilight"})
    with pytest.raises(ValueError, match=r"'twilight' the attended tokens depend on the data; give the density"):
        twilight.attention([100])
    assert twilight.attention([100], 0.1).read < twilight.attention([100], 0.2).read
    for settings, message in (
        ({"contexts": (0,)}, "context=0 must be >= 1"),
        ({"batches": ()}, "batch is empty"),
        ({"density": 1.5}, "density=1.5 must be finite"),
        ({"page_size": 24}, "page_size=24 has no kernel; use one of 16, 32, 64"),
    ):
        with pytest.raises(ValueError, match=message):
            Grid(**settings)
    model, device = ModelConfig.from_pretrained(path), PRESETS["h100"]
    with pytest.raises(ValueError, match="max_model_len=1024 is over the 512 positions"):
        plan(model, torch.float32, Grid(contexts=(1024,)), lambda ranks: [device] * len(ranks))


# ---- measured


def test_latency_and_bandwidth_follow_from_messages_of_two_sizes() -> None:
    links = Interconnect(2e9, (Protocol(1e-4, 0.0, 1.0),))
    small, large = (links.all_reduce_s(size, 4) for size in (4096, large_message(4096)))
    found = _links(4096, small, large, 4)
    assert found.all_reduce_s(1 << 20, 4) == pytest.approx(links.all_reduce_s(1 << 20, 4))
    assert _links(4096, small, small / 2, 4).all_reduce_s(4096, 4) >= 0.0, "a noisy run gives no negative time"


def check_measured(path: Path, measured: Callable[[list[RankCostModel]], list[Hardware]]) -> None:
    """Two ranks' measurement of dense and Quest: whole, consistent with its own rates, and enough for a step's times."""
    ranks = [on_paper(path, 2, sparse) for sparse in (None, {"method": "quest", "token_budget": 64, "dense_layers": 0})]
    dense, quest = measured(ranks)
    assert dense.measured and dense.name == "cpu" and 1e8 < dense.bandwidth < 1e12
    assert dense.links.all_reduce_s(512, 2) > 1e-6
    assert dense.sparse_share == dense.dense_share == quest.dense_share > 0
    assert 0 < quest.select_share != quest.sparse_share > 0, "scoring and attending are timed apart"
    time = expected(ranks[1], quest, 256, 2)
    assert all(part > 0 for part in (time.weights_s, time.attention_s, time.select_s, time.kernels_s, time.all_reduce_s))
    rates = {rate.name: rate for rate in quest.rates}
    assert all(0 < rate.low <= rate.median <= rate.high for rate in rates.values())
    assert rates["quest: scoring"].median == pytest.approx(quest.select_share * quest.bandwidth)
    assert rates["a kernel beside its bytes"].median == quest.kernel_s
    assert sum(name.startswith("all-reduce of") for name in rates) == 2
    assert not any("quest" in rate.name for rate in dense.rates), "a device has its own method's rates alone"


def test_two_ranks_measure_together_what_a_step_is_made_of(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BUFFER_BYTES", 1 << 22)
    threads = torch.get_num_threads()

    def in_threads(ranks: list[RankCostModel]) -> list[Hardware]:
        papers = [(rank.model, 2, rank.sparse, 16, rank.geometry.dtype) for rank in ranks]
        pipes = [Pipe(duplex=False) for _ in range(2)]
        arguments = (papers, 256, 2, 1, str(tmp_path / "store"))
        with ThreadPoolExecutor(2) as pool:
            done = [pool.submit(measure._run, number, *arguments, there) for number, (_, there) in enumerate(pipes)]
            for each in done:
                each.result(60)
        return measure._as_hardware([here.recv() for here, _ in pipes], ranks, 2)

    try:
        check_measured(path, in_threads)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_this_machine_is_measured_by_as_many_processes_as_there_are_ranks(path: Path) -> None:
    check_measured(path, lambda ranks: measure.measure_cpu(ranks, context=256, batch=2, num_threads=1, timeout_s=120))


def test_a_rate_is_the_middle_of_its_rounds_and_fast_rounds_are_high_rates() -> None:
    times = Times([0.1, 0.2, 0.4])
    rate = measure._per_second("reading", 10, times)
    assert (rate.median, rate.low, rate.high) == pytest.approx((50, 10 / 0.36, 10 / 0.12))
    assert rate.varied == pytest.approx(3)
    of_part = measure._seconds("a kernel", times, 2)
    assert (of_part.median, of_part.low, of_part.high) == pytest.approx((0.1, 0.06, 0.18))
