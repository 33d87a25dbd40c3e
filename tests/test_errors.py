"""What a user may get wrong, at start-up and per request: each answer names the value and the remedy, and harms nobody else."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distributed_sparse import LLM, SamplingParams
from distributed_sparse.config import EngineConfig
from distributed_sparse.protocol.client import NewRequest
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engine import make_llm

NODE = socket.gethostname()
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    if "llm" in request.fixturenames:  # that engine outlives the test
        request.getfixturevalue("llm")
    before = engine_threads()
    yield
    assert engine_threads() <= before


def engine_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name in ("driver", "outputs")}


def edited(source: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of a checkpoint with other tensors."""
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# ---- settings


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"tensor_parallel_size": 3}, "tensor_parallel_size=3 does not divide num_key_value_heads=4; use 1, 2 or 4"),
    ({"tensor_parallel_size": 8}, "tensor_parallel_size=8 does not divide num_key_value_heads=4; use 1, 2 or 4"),
    ({"page_size": 24}, "page_size=24 is not a power of two; use one of 16, 32, 64"),
    ({"tensor_paralel_size": 2}, "LLM: unknown key 'tensor_paralel_size'; did you mean 'tensor_parallel_size'?"),
    ({"max_model_len": 513}, r"max_model_len=513 is over the 512 positions of the checkpoint .*; use at most 512"),
    ({"sparse": {"token_budget": 64}}, "sparse has no method; use one of dense, quest, .*window"),
    ({"sparse": {"method": "qest"}}, "sparse.method='qest' is not known; use one of 'dense', 'quest'"),
    ({"sparse": {"method": 3}}, "sparse.method=3 is not known; use one of 'dense', 'quest'"),
    ({"sparse": {"method": "no_such_module:Policy"}}, "sparse.method='no_such_module:Policy' is not importable"),
    ({"sparse": {"method": "json:JSONDecoder"}}, "sparse.method='json:JSONDecoder' is not a subclass of .*Policy"),
    (
        {"sparse": {"method": "quest", "token_buget": 64}},
        "sparse: unknown key 'token_buget'; did you mean 'token_budget'?",
    ),
    (
        {"sparse": {"method": "quest", "token_budget": 16}},
        r"sparse.token_budget=16 is below the 3 forced pages of 16 tokens \(sink_pages=1, recent_pages=2\); set it to 48",
    ),
    (
        {"sparse": {"method": "window", "token_budget": 64, "sink_pages": 4}, "page_size": 32},
        "sparse.token_budget=64 is below the 6 forced pages of 32 tokens .*; set it to 192 or more",
    ),
    ({"sparse": {"method": "quest", "recent_pages": 0}}, "sparse.recent_pages=0 is below 1: .*set it to 1 or more"),
    ({"sparse": {"method": "quest", "token_budget": "64"}}, r"sparse: Expected `int`, got `str` - at `\$.token_budget`"),
    (
        {"sparse": {"method": "quest", "layers": [{"range": "1-3", "token_budget": 64}]}},
        "sparse.layers range '1-3' goes beyond the model's last layer, 2; shorten it",
    ),
    ({"sparse": {"method": "quest", "layers": [{"range": "x"}]}}, "sparse.layers range 'x' is not understood; write '2-15'"),
    (
        {"sparse": {"method": "quest", "layers": [{"range": "2", "layers": []}]}},
        "sparse.layers: an override cannot have layers of its own",
    ),
    (
        {"sparse": {"method": "quest", "layers": [{"range": "2", "token_budget": 16}]}},
        "sparse.token_budget=16 is below the 3 forced pages",
    ),
    ({"tokenizer": "absent/folder/deep"}, "tokenizer='absent/folder/deep' is neither a local folder nor a hub id"),
    (
        {"distributed_executor_backend": "uni", "tensor_parallel_size": 2},
        "distributed_executor_backend='uni' holds one rank, but tensor_parallel_size=2; use 'ray' or tensor_parallel_size=1",
    ),
]


@pytest.mark.parametrize(("settings", "message"), SETTINGS, ids=[str(settings) for settings, _ in SETTINGS])
def test_a_wrong_setting_is_refused_before_anything_starts(
    path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(LLM, "_start_service", lambda *_: pytest.fail("the engine was started"))
    with pytest.raises(ValueError, match=message):
        LLM(str(path), **{"device": "cpu", **settings})


def test_an_unknown_key_of_a_yaml_is_refused_with_the_file_and_the_nearest_key(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {path}\nmax_num_batchd_tokens: 64\n")
    with pytest.raises(
        ValueError, match=r"run.yaml: unknown key 'max_num_batchd_tokens'; did you mean 'max_num_batched_tokens'\?"
    ):
        LLM.from_config(EngineConfig.from_yaml(file))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(path: Path) -> None:
    with pytest.raises(ValueError, match="device='cuda' but this process sees no CUDA device; use device='cpu'"):
        make_llm(path, device="cuda")


# ---- checkpoints


def test_a_missing_tensor_is_named_with_its_shape(path: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    broken = edited(path, tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(
        ValueError, match=rf"tensor {name} of shape \[96, 64\] is missing from the safetensors files in {broken}"
    ):
        make_llm(broken, device="cpu")


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(path: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    broken = edited(path, tmp_path, lambda tensors: tensors.update({name: torch.zeros(32, 64)}))
    with pytest.raises(ValueError, match=rf"tensor {name} in .* has shape \[32, 64\]; config.json asks for \[64, 64\]"):
        make_llm(broken, device="cpu")


def test_an_absent_checkpoint_is_named_with_the_node(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no folder {tmp_path}/absent on node {NODE}; every node needs the checkpoint"):
        make_llm(tmp_path / "absent")


def test_a_folder_without_config_or_weights_says_what_is_missing(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no config.json in {tmp_path} on node {NODE}; give the folder of a Hugging Face"):
        make_llm(tmp_path)
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(ValueError, match=rf"no \*.safetensors in {tmp_path} on node {NODE}; .*load_format='dummy'"):
        make_llm(tmp_path, device="cpu")
    with make_llm(tmp_path, device="cpu", load_format="dummy") as llm:
        assert len(llm.generate([1, 2], GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 10
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match=r"holds only pickled weights, but only safetensors are supported; convert it"):
        make_llm(tmp_path, device="cpu")


def test_another_architecture_is_refused_with_those_that_are_supported(path: Path, tmp_path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))
    with pytest.raises(ValueError, match=r"model_type='mixtral' is not supported; supported are Llama .*Qwen3 \(qwen3\)"):
        make_llm(tmp_path)


def test_a_sliding_window_that_would_matter_is_refused_and_a_shorter_context_runs(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "mistral", sliding_window=64)
    with pytest.raises(
        ValueError, match=r"sliding_window=64 .* is shorter than max_model_len=128.*; use max_model_len=64 or less"
    ):
        make_llm(path, device="cpu", max_model_len=128)
    with make_llm(path, device="cpu", max_model_len=64) as llm:
        assert len(llm.generate([1] * 54, GREEDY, use_tqdm=False)[0].outputs[0].token_ids) == 10


@pytest.mark.parametrize("num_bytes", [1, 30_000, 100_000])
def test_a_cache_too_small_for_one_sequence_is_refused_with_the_bytes_that_suffice(path: Path, num_bytes: int) -> None:
    # 3 layers x (K, V) x 4 KV heads x 16 tokens x 16 channels x 4 bytes = 24,576 bytes a page; 8 pages and the null page
    held = max(num_bytes // 24_576 - 1, 0) * 16
    message = (
        f"holds {held} tokens, less than one sequence of max_model_len=128; .*raise kv_cache_memory_bytes to at least 221184"
    )
    with pytest.raises(ValueError, match=message):
        make_llm(path, device="cpu", max_model_len=128, kv_cache_memory_bytes=num_bytes)
    with pytest.raises(ValueError, match="holds 112 tokens"):
        make_llm(path, device="cpu", max_model_len=128, kv_cache_memory_bytes=221_183)
    with make_llm(path, device="cpu", max_model_len=128, kv_cache_memory_bytes=221_184) as llm:
        whole = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
        assert len(llm.generate([1] * 100, whole, use_tqdm=False)[0].outputs[0].token_ids) == 28


# ---- requests


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with make_llm(path, device="cpu", max_model_len=128, max_num_seqs=6) as llm:
        yield llm


PARAMS = SamplingParams(max_tokens=4)
MALFORMED: list[tuple[Any, Any, str]] = [
    ([], PARAMS, "the prompt is empty; give at least one token"),
    ([331], PARAMS, r"prompt_token_ids\[0\]=331 is outside the vocabulary of 331 tokens; use ids in 0..330"),
    ([1, 2, 10**30], PARAMS, r"prompt_token_ids\[2\]=10+ is outside the vocabulary"),
    ([1, -1], PARAMS, r"prompt_token_ids\[1\]=-1 is outside the vocabulary"),
    ([1, 2.0], PARAMS, r"prompt_token_ids\[1\]=2.0 is float, not an int"),
    ([1, "2"], PARAMS, r"prompt_token_ids\[1\]='2' is str, not an int"),
    ([1, None], PARAMS, r"prompt_token_ids\[1\]=None is NoneType, not an int"),
    ([True, 2], PARAMS, r"prompt_token_ids\[0\]=True is bool, not an int"),
    ([1, [2]], PARAMS, r"prompt_token_ids\[1\]=\[2\] is list, not an int"),
    ([1, float("nan")], PARAMS, r"prompt_token_ids\[1\]=nan is float"),
    ([1, np.int64(2)], PARAMS, r"prompt_token_ids\[1\]=.*2.* is int64, not an int; give Python ints"),
    (None, PARAMS, "prompt.*=None must be a"),
    (7, PARAMS, "prompt.*=7 must be a"),
    ({"prompt": 3}, PARAMS, "prompt.*=.*3.* must be a"),
    (np.array([1, 2]), PARAMS, r"prompt.*=array\(\[1, 2\]\) must be a"),
    (torch.tensor([1, 2]), PARAMS, r"prompt.*=tensor\(\[1, 2\]\) must be a"),
    ([1] * 125, PARAMS, r"prompt of 125 tokens \+ max_tokens=4 is over max_model_len=128; use max_tokens <= 3"),
    ([1] * 128, PARAMS, "over max_model_len=128; shorten the prompt below 128 tokens"),
    ([1] * 1000, SamplingParams(max_tokens=None), "over max_model_len=128; shorten the prompt"),
    ([1], SamplingParams(max_tokens=10**9), "max_tokens=1000000000 is over max_model_len=128; use max_tokens <= 127"),
    ([1], SamplingParams(max_tokens=None, min_tokens=128), "min_tokens=128 is over max_model_len=128; use min_tokens <= 127"),
    ([1], SamplingParams(n=7), "n=7 is over max_num_seqs=6; lower n or raise max_num_seqs"),
    ([1], SamplingParams(logprobs=332), "logprobs=332 is over the vocabulary's 331 tokens; use at most 331"),
    ([1], SamplingParams(prompt_logprobs=400), "prompt_logprobs=400 is over the vocabulary's 331 tokens"),
    ([1], SamplingParams(stop_token_ids=[2, 331]), "stop_token_ids: token id 331 is outside the vocabulary of 331"),
    ([1], SamplingParams(stop=["x"]), r"stop=\['x'\] needs a tokenizer.*use stop_token_ids"),
    ([1, 2], SamplingParams(decode_last_prompt_tokens=2), "decode_last_prompt_tokens=2 must be below the prompt's 2 tokens"),
    ([1, 2], {"max_tokens": 3}, "sampling_params={'max_tokens': 3} must be a SamplingParams"),
    ([1, 2], None, "sampling_params=None must be a SamplingParams"),
    ("text", PARAMS, "needs a tokenizer|must be a list of token ids"),
]
VALID = [[1, 5 + i, 6, 7 * i] for i in range(6)]


def test_there_are_thirty_kinds_of_malformed_requests() -> None:
    assert len(MALFORMED) == 30


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[int]]:
    return [llm.generate(prompt, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for prompt in VALID]


def test_malformed_requests_among_valid_ones_are_refused_alone(llm: LLM, alone: list[list[int]]) -> None:
    prompts: list[Any] = []
    params: list[Any] = []
    for index, (prompt, own, _) in enumerate(MALFORMED):
        prompts += [prompt, VALID[index % 6]]
        params += [own, GREEDY]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for output, (prompt, _, message) in zip(outputs[::2], MALFORMED):
        assert output.finished and output.outputs[0].finish_reason == "error" and output.error, prompt
        with pytest.raises(ValueError, match=message):
            raise ValueError(output.error)
    assert [output.outputs[0].token_ids for output in outputs[1::2]] == alone * 5


def test_the_driver_refuses_them_too_while_valid_ones_run(llm: LLM, alone: list[list[int]]) -> None:
    """What reaches the Driver past a client's own check must not hurt the others either."""
    streams = [iter(llm.stream(prompt, GREEDY)) for prompt in VALID]
    for stream in streams:
        next(stream)
    requests = [NewRequest(f"wrong-{i}", prompt, own) for i, (prompt, own, _) in enumerate(MALFORMED)]
    updates = llm._client.submit(requests)
    refused = [updates.get(timeout=30) for _ in requests]
    assert [update.request_id for update in refused] == [request.request_id for request in requests]
    for update, (_, _, message) in zip(refused, MALFORMED):
        assert (update.finished, update.error_kind, update.samples) == (True, "invalid", [])
        with pytest.raises(ValueError, match=message):
            raise ValueError(update.error)
    assert [list(stream)[-1].outputs[0].token_ids for stream in streams] == alone
    stats = llm.stats()
    assert stats["requests"]["running"] == stats["requests"]["waiting"] == stats["pages"]["used"] == 0
    assert llm.health()


def test_a_malformed_stream_or_score_raises_at_once(llm: LLM) -> None:
    for prompt, own, message in MALFORMED:
        if own is not None:
            with pytest.raises(ValueError, match=message):
                llm.stream(prompt, own)
    for wrong in ([331], [1, 2.0], [1] * 129, [[1, 2], [331]]):
        with pytest.raises(ValueError):
            llm.score(wrong)  # type: ignore[arg-type]
