"""The whole-engine benchmark: engines over filled caches, in turns with transformers, none of them timed unless it is right."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from distributed_sparse.cache import Geometry
from distributed_sparse.client.client import EngineError
from distributed_sparse.selection import base, policy_class
from distributed_sparse.tools.bench import contestants, decode, peers, synthetic, ttft
from distributed_sparse.tools.bench.accuracy import WrongResult
from distributed_sparse.tools.bench.contestants import Contestant, Round, Task, Vllm, step_gaps, without_bunches
from distributed_sparse.tools.bench.decode import DecodeSettings, Point, bench_decode
from distributed_sparse.tools.bench.flashinfer_dense import METHOD, FlashInferConfig, FlashInferPolicy
from distributed_sparse.tools.bench.layer import LayerSettings, check, make_inputs
from distributed_sparse.tools.bench.models import BenchModel, bench_model
from distributed_sparse.tools.bench.timing import Unavailable
from distributed_sparse.tools.bench.transformers_peer import Truth, check_token, transformers_model
from distributed_sparse.tools.planner.rank import RankCostModel
from tests.support.bench_models import tiny_shape
from tests.support.checkpoints import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
CONTEXT, TOKENS = 1536, 8


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DecodeSettings:
    monkeypatch.setattr(decode, "read_bandwidth", lambda device: 2e9)
    return DecodeSettings(
        model=str(tiny_shape(tmp_path)),
        context=(CONTEXT,),
        batch=(2,),
        output_len=TOKENS,
        rounds=2,
        warm_up_s=0.0,
        set=("sparse.token_budget=256",),
    )


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["contestant"]: row for row in rows}


def test_every_contestant_has_its_time_its_bytes_and_its_ratios(settings: DecodeSettings) -> None:
    found = by_name(bench_decode(settings))
    assert list(found) == ["dense", "quest", "transformers static", "transformers dynamic"]
    assert not [row for row in found.values() if "unavailable" in row or "wrong" in row]
    with bench_model(settings.model) as model:
        for method in ("dense", "quest"):
            paper = RankCostModel(model.config, 1, settings.sections()[method], 16, torch.float32)
            # a round's decode steps: the first token comes from the prompt's last one
            contexts = range(CONTEXT - TOKENS // 2 + 1, CONTEXT - TOKENS // 2 + TOKENS)
            read = sum(paper.attention([n, n]).read for n in contexts) / (TOKENS - 1)
            assert found[method]["MB_per_step"] * 1e6 == pytest.approx(paper.weight_bytes_read(2) + read)
            assert found[method]["bytes_ms"] == pytest.approx(found[method]["MB_per_step"] / 2)
    for row in found.values():
        assert row["p10_ms"] <= row["tpot_ms"] <= row["p90_ms"] and row["in_turns"]
        assert row["over_bytes"] == pytest.approx(row["tpot_ms"] / row["bytes_ms"])
        assert row["context"] == CONTEXT and row["batch"] == 2
    quest, dense = found["quest"], found["dense"]
    assert quest["bytes_limit"] == pytest.approx(dense["MB_per_step"] / quest["MB_per_step"]) and quest["bytes_limit"] > 1.2
    assert dense["speedup_over_dense"] == 1 and dense["speedup_over_one_rank"] is None
    assert 1.0 in {found[f"transformers {kind}"]["speedup_over_transformers"] for kind in ("static", "dynamic")}
    assert "short sequence" in dense["checked"]


# ---- no speed of a wrong result


def test_an_engine_whose_attention_is_wrong_is_refused(settings: DecodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    right = base.attend
    monkeypatch.setattr(base, "attend", lambda *arguments, **options: right(*arguments, **options) * 1.5)
    found = by_name(bench_decode(settings))
    for name in ("dense", "quest"):
        assert "of transformers' log-probabilities" in found[name]["wrong"] and "tpot_ms" not in found[name]
    assert found["transformers static"]["tpot_ms"] > 0


def test_an_engine_that_reads_another_long_context_is_refused(
    settings: DecodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right for short prompts, but its cache of the long one holds other values than transformers'."""
    right = synthetic._of_heads
    monkeypatch.setattr(synthetic, "_of_heads", lambda *which: (right(*which)[0], -3 * right(*which)[1]))
    found = by_name(bench_decode(settings))
    assert "standard deviations of the logits" in found["dense"]["wrong"] and "tpot_ms" not in found["dense"]


def test_only_a_tie_excuses_another_token() -> None:
    logits = torch.linspace(-2.0, 2.0, 101)
    assert check_token("x", 100, logits, torch.float32)
    with pytest.raises(WrongResult, match=r"x is 99, and transformers' is 100"):
        check_token("x", 99, logits, torch.float32)
    logits[99] = logits[100] - 1e-5
    assert not check_token("x", 99, logits, torch.float32)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_peer_computes_what_transformers_makes_of_the_same_checkpoint(tmp_path: Path, family: str) -> None:
    """Biases and norms of q and k, and every matrix in its place."""
    extra = {"tie_word_embeddings": True} if family == "qwen2" else {}
    path = tiny_checkpoint(tmp_path, family, **extra)
    tokens = torch.arange(3, 40)[None]
    with bench_model(str(path), "float32") as model, torch.inference_mode():
        assert model.load_format == "auto"
        ours = transformers_model(model)(tokens).logits
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()(tokens).logits
    assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.std()))


def test_truth_gives_the_model_back_and_keeps_what_it_found(tmp_path: Path) -> None:
    with bench_model(str(tiny_shape(tmp_path))) as model:
        truth = Truth(model)
        first = truth.hf
        truth.drop()
        assert truth.hf is not first and truth._expected.shape == (len(truth.tokens) - 1, 331)


# ---- turns


def test_gaps_are_of_steps_in_which_all_sequences_decode() -> None:
    early, late = [0.0, 1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.5, 5.0, 6.0]
    assert step_gaps([early, late], 0.0) == [1.0, 1.0, 1.0]  # 2 to 3 and 3 to 4 of the one, 2 to 3 of the other
    assert step_gaps([early], 1.5) == [1.0, 1.0]
    assert step_gaps([early], 100.0) == [1.0, 1.0]  # too short a round: its second half
    assert step_gaps([[0.0, 1e-3, 1.0], [2.0, 2.0, 2.0]], 0.0) == [0.5, 0.0]  # never both at once: their means


def test_tokens_that_were_handed_over_together_are_spread_over_the_steps_that_they_took() -> None:
    on_time = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert without_bunches(on_time) == on_time
    assert without_bunches([0.0, 1.0, 3.999, 3.9995, 4.0, 5.0]) == pytest.approx(on_time)
    assert without_bunches([0.999, 1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert without_bunches([7.0]) == [7.0]


class Scripted(Contestant):
    """Takes the times that it is told to, and notes what is done with it."""

    def __init__(self, task: Any, name: str, log: list[str], seconds: list[float], num_bytes: int = 1) -> None:
        super().__init__(task)
        self.name, self.log, self.seconds, self._num_bytes = name, log, seconds, num_bytes

    num_bytes = property(lambda self: self._num_bytes)  # type: ignore[assignment]
    bytes_per_step = property(lambda self: 1e9)  # type: ignore[assignment]

    def open(self) -> None:
        self.log.append(f"open {self.name}")

    def round(self) -> Round:
        self.log.append(self.name)
        taken = self.seconds.pop(0)
        if taken < 0:
            raise Unavailable("it fell over")
        return Round([taken, taken])

    def close(self) -> None:
        self.log.append(f"close {self.name}")


def test_contestants_take_turns_and_ratios_are_of_the_same_round() -> None:
    log: list[str] = []
    task = SimpleNamespace(device=CPU)
    slow_twice = Scripted(task, "dense", log, [2.0, 20.0, 4.0])  # the machine is ten times slower in the second round
    other = Scripted(task, "quest", log, [1.0, 10.0, 1.0])
    point = Point([slow_twice, other], 3)
    point.run(None)
    assert log == ["open dense", "open quest", *["dense", "quest"] * 3, "close quest", "close dense"]
    rows = by_name(point.rows({1: 1e9}, None))
    assert rows["quest"]["speedup_over_dense"] == 2.0 and rows["quest"]["over_bytes"] == 1.0


def test_one_that_fails_ends_nobody_else() -> None:
    log: list[str] = []
    task = SimpleNamespace(device=CPU)
    point = Point([Scripted(task, "dense", log, [1.0, -1.0, 1.0]), Scripted(task, "quest", log, [1.0, 1.0, 1.0])], 3)
    point.run(None)
    rows = by_name(point.rows({1: 1e9}, None))
    assert log.count("dense") == 2 and log.count("quest") == 3
    assert rows["dense"] == {"contestant": "dense", "tensor_parallel_size": 1, "unavailable": "it fell over"}
    assert rows["quest"]["tpot_ms"] == 1e3 and rows["quest"]["speedup_over_dense"] is None


@pytest.mark.parametrize(("is_peer", "how"), [(True, "unavailable"), (False, "wrong")])
def test_any_failure_of_a_peer_is_no_failure_of_the_benchmark_but_of_an_engine_it_is(is_peer: bool, how: str) -> None:
    log: list[str] = []

    class Failing(Scripted):
        def round(self) -> Round:
            raise KeyError("no such kernel")

        def close(self) -> None:
            super().close()
            raise RuntimeError("it is gone already")

    task = SimpleNamespace(device=CPU)
    one = Failing(task, "other", log, [])
    one.is_peer = is_peer
    point = Point([one, Scripted(task, "dense", log, [1.0])], 1)
    point.run(None)
    rows = by_name(point.rows({1: 1e9}, None))
    assert rows["other"][how] == "other failed: KeyError: 'no such kernel'" and rows["dense"]["tpot_ms"] == 1e3
    assert log[-1] == "close other", "and each is closed"


def test_those_that_do_not_fit_together_run_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "available_bytes", lambda device: 100)
    log: list[str] = []
    task = SimpleNamespace(device=CPU)
    point = Point([Scripted(task, name, log, [1.0, 1.0], 60) for name in ("dense", "quest")], 2)
    point.run(None)
    assert log == ["open dense", "dense", "dense", "close dense", "open quest", "quest", "quest", "close quest"]
    assert not by_name(point.rows({1: 1e9}, None))["quest"]["in_turns"]


def test_what_does_not_fit_at_all_and_who_is_not_here_is_told(
    settings: DecodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        synthetic, "check_memory", lambda what, *_: (_ for _ in ()).throw(Unavailable(f"out of memory: {what}"))
    )
    found = by_name(bench_decode(replace(settings, peer=("flashinfer", "vllm"))))
    assert "out of memory: dense at 2 x 1536 tokens" in found["dense"]["unavailable"]
    assert found["flashinfer"]["unavailable"] == "flashinfer has no kernels for cpu"
    assert "vllm is not importable here" in found["vllm"]["unavailable"]


def test_without_transformers_engines_are_timed_and_said_to_be_unchecked(
    settings: DecodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise KeyError("no such architecture")

    monkeypatch.setattr(decode, "Truth", fails)
    found = by_name(bench_decode(replace(settings, method=("dense",))))
    why = "transformers failed: KeyError: 'no such architecture'"
    assert found["transformers"]["unavailable"] == why
    assert found["dense"]["checked"] == f"not checked: {why}" and found["dense"]["tpot_ms"] > 0


# ---- peers that are not installed here, by stand-ins of their interfaces


class StandInWrapper:
    """flashinfer's paged decode, in torch: what `plan` and `run` take and give."""

    plans = 0

    slow = (False,)
    """Values of `use_tensor_cores` with which it takes its time."""

    def __init__(self, workspace: Tensor, layout: str, use_tensor_cores: bool) -> None:
        assert layout == "HND"
        self.use_tensor_cores = use_tensor_cores

    def plan(
        self, indptr: Tensor, indices: Tensor, last: Tensor, heads: int, kv_heads: int, d: int, size: int, **options: Any
    ) -> None:
        type(self).plans += 1
        self.lists = [indices[a:b].long() for a, b in zip(indptr.tolist(), indptr.tolist()[1:])]
        self.last, self.group, self.scale = last.tolist(), heads // kv_heads, options["sm_scale"]

    def run(self, q: Tensor, pages: tuple[Tensor, Tensor], return_lse: bool = False) -> Any:
        if self.use_tensor_cores in self.slow:
            time.sleep(0.01)
        outs, sums = [], []
        for own, pages_of, last in zip(q, self.lists, self.last):
            k, v = (x[pages_of].transpose(0, 1).flatten(1, 2) for x in pages)
            n = k.shape[1] - pages[0].shape[2] + last
            k, v = (x[:, :n].repeat_interleave(self.group, 0) for x in (k, v))
            logits = (k @ own[:, :, None])[..., 0] * self.scale
            outs.append((logits.softmax(-1)[:, None] @ v)[:, 0])
            sums.append(logits.logsumexp(-1) / math.log(2))
        return (torch.stack(outs), torch.stack(sums)) if return_lse else torch.stack(outs)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be imported, and has kernels for CPUs."""
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=StandInWrapper))
    for module in (peers, decode):
        monkeypatch.setattr(module, "import_flashinfer", lambda device: sys.modules["flashinfer"])


@pytest.mark.parametrize("slow", [True, False])
def test_the_faster_of_flashinfer_s_kernels_stands_beside_our_own_dense_uncaptured(
    settings: DecodeSettings, flashinfer: None, monkeypatch: pytest.MonkeyPatch, slow: bool
) -> None:
    monkeypatch.setattr(StandInWrapper, "slow", (slow,))
    eager: dict[Any, bool] = {}
    opened = synthetic.SyntheticLLM

    def llm(*arguments: Any, **options: Any) -> Any:
        eager[(options["sparse"] or {}).get("method")] = options["enforce_eager"]
        return opened(*arguments, **options)

    monkeypatch.setattr(synthetic, "SyntheticLLM", llm)
    found = by_name(bench_decode(replace(settings, peer=("flashinfer",), method=("quest",), rounds=1)))
    name = f"dense by flashinfer/{'cuda' if slow else 'tensor'} cores"
    assert list(found) == ["quest", name, "dense eager"]
    for row in found.values():
        assert row["tpot_ms"] > 0 and "short sequence" in row["checked"]
    assert eager == {"quest": False, METHOD: False, "dense": True}


def test_a_flashinfer_kernel_that_does_not_have_the_sizes_leaves_the_other(
    flashinfer: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = StandInWrapper.plan

    def plan(self: StandInWrapper, *arguments: Any, **options: Any) -> None:
        if not self.use_tensor_cores:
            raise ValueError("Unsupported group_size: 7")
        right(self, *arguments, **options)

    monkeypatch.setattr(StandInWrapper, "plan", plan)
    monkeypatch.setattr(StandInWrapper, "slow", (True,))
    with bench_model(str(tiny_shape(tmp_path))) as model:
        task = Task(model, 64, 2, 8, 0.0)
        assert [one.name for one in decode._flashinfer(task, 1, None)] == ["dense by flashinfer/tensor cores", "dense eager"]


def test_flashinfer_that_does_not_compile_is_left_out(
    settings: DecodeSettings, flashinfer: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("Ninja build failed.\n[1/3] nvcc")

    monkeypatch.setattr(StandInWrapper, "run", fails)
    found = by_name(bench_decode(replace(settings, peer=("flashinfer",), method=("dense",), rounds=1)))
    assert found["flashinfer"]["unavailable"] == "flashinfer failed: RuntimeError: Ninja build failed."
    assert found["dense"]["tpot_ms"] > 0


def test_flashinfer_in_place_of_dense_attention_gives_dense_attention(flashinfer: None) -> None:
    geometry = Geometry(2, 2, 64, 16, torch.float32, CPU, 0)
    inputs = make_inputs(LayerSettings(context=333, batch=2, num_heads=4, num_kv_heads=2, head_dim=64), geometry, (), 0)
    policy = policy_class(METHOD)(FlashInferConfig(), geometry)
    assert isinstance(policy, FlashInferPolicy)
    selection = policy.select(inputs.q, inputs.cache, inputs.batch)
    assert (selection.attended(inputs.batch.last_page_len, 16) == 333).all(), "counted as what it is, dense"
    check(inputs, policy, geometry)
    out = base.attend_selection(inputs.q, inputs.cache, inputs.batch, selection, geometry.scale)
    dense = base.dense_selection(inputs.batch, 2)
    assert torch.allclose(out, base.attend_selection(inputs.q, inputs.cache, inputs.batch, dense, geometry.scale), atol=1e-5)
    before = StandInWrapper.plans
    policy.select(inputs.q, inputs.cache, inputs.batch)
    assert StandInWrapper.plans == before, "one plan serves all layers of a step"


class StandInVllm:
    """vLLM's offline interface: 5 s for prompts that are not in its prefix cache, a quarter of one per further token."""

    tells_times = True
    cached_share = 1.0
    now = 0.0

    def __init__(self, **options: Any) -> None:
        assert options["skip_tokenizer_init"] and options["enable_prefix_caching"] and not options["disable_log_stats"]
        self.longest = options["max_model_len"]
        self.seen: set[tuple[int, ...]] = set()

    def generate(self, prompts: list[dict], params: Any, use_tqdm: bool) -> list[Any]:
        ids = [tuple(prompt["prompt_token_ids"]) for prompt in prompts]
        assert len(ids[0]) + params.max_tokens <= self.longest
        type(self).now += 5.0 * (not self.seen.issuperset(ids))
        first = self.now
        type(self).now += 0.25 * (params.max_tokens - 1)
        metrics = SimpleNamespace(first_token_ts=first + 1.0, last_token_ts=self.now + 1.0) if self.tells_times else None
        cached = [int(self.cached_share * len(prompt)) if prompt in self.seen else 0 for prompt in ids]
        self.seen.update(ids)
        tokens = SimpleNamespace(token_ids=[1] * params.max_tokens)
        return [SimpleNamespace(outputs=[tokens], metrics=metrics, num_cached_tokens=count) for count in cached]


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vllm]:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=StandInVllm, SamplingParams=SimpleNamespace))
    monkeypatch.setattr(contestants, "time", SimpleNamespace(monotonic=lambda: StandInVllm.now))
    with bench_model(str(tiny_shape(tmp_path))) as model:
        one = Vllm(Task(model, 64, 2, 8, 0.0))
        one.open()
        yield one
        one.close()


def test_vllm_s_time_per_token_is_by_its_own_times_of_each_request(vllm: Vllm) -> None:
    found = vllm.round()
    assert found.gaps == [0.25, 0.25] and [len(tokens) for tokens in found.tokens] == [8, 8]


def test_of_a_vllm_that_tells_no_times_two_lengths_are_compared(vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandInVllm, "tells_times", False)
    found = vllm.round()
    assert found.gaps == [0.25] and [len(tokens) for tokens in found.tokens] == [8, 8]


def test_a_vllm_that_computes_prompts_among_its_steps_is_not_timed(vllm: Vllm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandInVllm, "cached_share", 0.5)
    with pytest.raises(Unavailable, match="prefix cache held 30 of 60 prompt tokens"):
        vllm.round()


# ---- time to first token


def test_first_tokens_are_timed_of_prompts_that_are_computed(settings: DecodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    filled = []
    monkeypatch.setattr(synthetic.SyntheticShard, "_fill", lambda *_: filled.append(True))
    rows = ttft.bench_ttft(replace(settings, ttft=(1100,)))
    found = by_name(rows)
    assert list(found) == ["transformers", "dense", "quest"] and not filled
    for row in rows:
        assert row["p10_ms"] <= row["ttft_ms"] <= row["p90_ms"] and row["prompt_len"] == 1100
        assert row["checked"] == "its first token with transformers'"
    assert found["transformers"]["over_transformers"] == 1


def test_an_engine_with_another_first_token_has_no_time(settings: DecodeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ttft.first_token
    monkeypatch.setattr(ttft, "first_token", lambda hf, prompt: (0.1, -first(hf, prompt)[1]))
    found = by_name(ttft.bench_ttft(replace(settings, ttft=(64,))))
    assert "standard deviations" in found["dense"]["wrong"] and "ttft_ms" not in found["dense"]


@pytest.mark.parametrize("failing", ["dense", "transformers"])
def test_who_fails_at_its_first_token_ends_nobody_else(
    settings: DecodeSettings, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    send, first_token = ttft.send, ttft.first_token
    failed: list[str] = []

    def fails(name: str, right: Any) -> Any:
        def run(*arguments: Any) -> Any:
            if name == failing and len(failed) < 1:  # of the engines the first one, dense
                failed.append(name)
                raise EngineError("it ended")
            return right(*arguments)

        return run

    monkeypatch.setattr(ttft, "send", fails("dense", send))
    monkeypatch.setattr(ttft, "first_token", fails("transformers", first_token))
    found = by_name(ttft.bench_ttft(replace(settings, ttft=(64,))))
    others = {"transformers", "dense", "quest"} - {failing}
    assert all(found[name]["ttft_ms"] > 0 for name in others) and "ttft_ms" not in found[failing]
    how = "unavailable" if failing == "transformers" else "wrong"
    assert found[failing][how] == f"{failing} failed: EngineError: it ended"
    assert found["quest"]["checked"] == ("not checked" if failing == "transformers" else "its first token with transformers'")


def test_contexts_that_are_too_short_are_refused_before_anything_is_made() -> None:
    """1024 tokens of a prompt are filled synthetically, and the context is in the middle of a round."""
    for output_len, least in ((16, 1032), (1024, 2050)):
        DecodeSettings(context=(least,), output_len=output_len)
        too_short = least - 1
        with pytest.raises(ValueError, match=rf"--context {too_short} is too short.*; give {least} or more"):
            DecodeSettings(context=(32768, too_short), output_len=output_len)


def test_settings_that_cannot_be_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="--peer='tensorrt' is not known"):
        DecodeSettings(peer=("tensorrt",))
    with pytest.raises(ValueError, match="--output-len 2 is below 4"):
        DecodeSettings(output_len=2)
    with pytest.raises(ValueError, match="only keys of `sparse` can be set"):
        DecodeSettings(set=("page_size=32",)).sections()
    assert DecodeSettings(set=("sparse.token_budget=64",)).sections() == {
        "dense": {"method": "dense"},
        "quest": {"method": "quest", "token_budget": 64},
    }


def test_models_go_by_name_by_folder_and_by_the_weights_that_they_have(tmp_path: Path) -> None:
    with bench_model("attention-heavy") as model:
        assert model.load_format == "dummy" and model.config.num_hidden_layers == 8
        assert json.loads((model.path / "config.json").read_text())["hidden_size"] == 1024
    with bench_model("llama-3.1-8b") as model:
        assert isinstance(model, BenchModel) and model.load_format == "dummy" and model.config.num_hidden_layers == 32
    with bench_model(str(tiny_checkpoint(tmp_path))) as model:
        assert model.load_format == "auto"
    with pytest.raises(ValueError), bench_model(str(tmp_path / "nowhere")):
        pass


@pytest.mark.ray
@pytest.mark.slow
def test_ranks_of_a_cluster_fill_their_own_heads_and_decode_what_one_rank_does(
    settings: DecodeSettings, local_ray: None
) -> None:
    """Dense tokens of both are compared with transformers', over the same cache."""
    rows = bench_decode(replace(settings, tensor_parallel_size=(1, 2), method=("dense",), batch=(1,), rounds=1, threads=1))
    found = {(row["contestant"], row["tensor_parallel_size"]): row for row in rows}
    one, two = found["dense", 1], found["dense", 2]
    assert "wrong" not in one and "wrong" not in two and one["in_turns"]
    assert two["speedup_over_one_rank"] == pytest.approx(one["tpot_ms"] / two["tpot_ms"], rel=0.5)
    with bench_model(settings.model) as model:
        paper = RankCostModel(model.config, 2, None, 16, torch.float32)
        weights, context = paper.weight_bytes_read(1), CONTEXT - TOKENS // 2 + TOKENS / 2
        assert two["MB_per_step"] * 1e6 == pytest.approx(weights + paper.attention([int(context)]).read)
