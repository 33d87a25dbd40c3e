"""Scripts that were written for vLLM: with another import line they run, or are told by name what they must leave out."""

from __future__ import annotations

import enum
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distributed_sparse import LLM, CompletionOutput, EngineConfig, SamplingParams, TextPrompt, TokensPrompt
from distributed_sparse.client.generation_defaults import default_sampling_params
from distributed_sparse.utils.vllm_names import ENGINE
from tests.support.engine import make_llm
from tests.support.text_checkpoint import byte_level_bos_tokenizer, text_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
IDS = [1, 5, 6, 7]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_checkpoint(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with make_llm(path, max_model_len=256, max_num_seqs=8) as llm:
        yield llm


# ---- whole scripts

SCRIPT = """
from vllm import LLM, SamplingParams

prompts = ["the quick brown", "the lazy dog", "again"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)


def main():
    llm = LLM(model="MODEL")
    outputs = llm.generate(prompts, sampling_params)
    for output in outputs:
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"{prompt!r} -> {generated_text!r}")


if __name__ == "__main__":
    main()
"""
"""The calls of vLLM's basic offline example."""

DEFAULTS_SCRIPT = """
from vllm import LLM, TokensPrompt

llm = LLM(model="MODEL", trust_remote_code=False, swap_space=4, disable_log_stats=True, seed=None, max_num_seqs=None)
sampling_params = llm.get_default_sampling_params()
sampling_params.max_tokens = 5
sampling_params.temperature = 0.0
tokenizer = llm.get_tokenizer()
prompts = [TokensPrompt(prompt_token_ids=tokenizer.encode(text)) for text in ("the fox", "", "dog " * 9000)]
for output in llm.generate(prompts=prompts, sampling_params=sampling_params, lora_request=None):
    print(output.outputs[0].finish_reason, len(output.outputs[0].token_ids), repr(output.outputs[0].text))
"""


def run(script: str, model: Path) -> None:
    script = script.replace("from vllm import", "from distributed_sparse import").replace("MODEL", str(model))
    exec(compile(script, "script.py", "exec"), {"__name__": "__main__"})


def test_the_basic_offline_example_runs_with_another_import_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(SCRIPT, path)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" -> ")[0] for line in lines] == ["'the quick brown'", "'the lazy dog'", "'again'"]
    assert all(len(line.partition(" -> ")[2]) > 2 for line in lines)


def test_defaults_that_are_changed_and_a_refused_prompt_among_others(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(DEFAULTS_SCRIPT, path)
    fox, bos, long = capsys.readouterr().out.splitlines()
    assert fox.startswith("length 5 '") and bos.startswith("length 5 '")
    assert long == "error 0 ''"


# ---- prompts


def test_all_forms_of_a_prompt_may_be_mixed_and_mean_the_same(llm: LLM) -> None:
    ids = byte_level_bos_tokenizer()("the quick")["input_ids"]
    both: Any = {"prompt_token_ids": ids, "prompt": "shown, not read", "multi_modal_data": None, "cache_salt": "x"}
    forms: list[Any] = ["the quick", ids, TextPrompt(prompt="the quick"), TokensPrompt(prompt_token_ids=ids), both]
    outputs = llm.generate(forms, GREEDY, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * 5
    assert [output.prompt for output in outputs] == ["the quick", None, "the quick", None, "shown, not read"]
    assert [output.prompt_token_ids for output in outputs] == [ids] * 5
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    for form in forms:
        (alone,) = llm.generate(form, GREEDY, use_tqdm=False)
        assert alone.outputs[0].token_ids == outputs[0].outputs[0].token_ids
        assert list(llm.stream(form, GREEDY))[-1].outputs == alone.outputs


WRONG_PROMPTS: list[tuple[Any, str]] = [
    ({"prompt": "x", "multi_modal_data": {"image": 3}}, "multi_modal_data={'image': 3}: multi_modal_data is not supported"),
    ({"prompt": "x", "mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs={'a': 1}: mm_processor_kwargs is not supported"),
    ({"prompt_embeds": [[0.0]]}, "prompt_embeds=[[0.0]]: prompt_embeds is not supported; give token ids"),
    ({"encoder_prompt": "x", "decoder_prompt": None}, "encoder_prompt='x': encoder_prompt is not supported"),
    ({"promt": "x"}, "prompt: unknown key 'promt'; did you mean 'prompt'?"),
    ({}, "prompt={} is empty; give {'prompt': text} or {'prompt_token_ids': [...]}"),
    ({"prompt": None}, "prompt={'prompt': None} is empty"),
    ({"prompt": [1, 2]}, "prompt=[1, 2] must be a str; give token ids as {'prompt_token_ids': [...]}"),
    ({"prompt_token_ids": "x"}, "prompt_token_ids='x' must be a list of token ids"),
    ({"prompt_token_ids": np.array([1])}, "must be a list of token ids (an array's .tolist())"),
    ({"prompt_token_ids": []}, "the prompt is empty"),
    ({"prompt_token_ids": [331]}, "is outside the vocabulary of 331 tokens"),
]


def test_a_prompt_that_is_refused_has_one_output_that_says_error_and_stops_no_other(llm: LLM) -> None:
    prompts: list[Any] = [form for prompt, _ in WRONG_PROMPTS for form in (prompt, IDS)]
    outputs = llm.generate(prompts, GREEDY.updated({"n": 2}), use_tqdm=False)
    for output, (_, message) in zip(outputs[::2], WRONG_PROMPTS):
        assert message in str(output.error)
        assert output.outputs == [CompletionOutput(0, "", [], "error")]
    assert all(len(output.outputs[1].token_ids) == 6 for output in outputs[1::2])


@pytest.mark.parametrize(("prompt", "message"), WRONG_PROMPTS, ids=[str(prompt) for prompt, _ in WRONG_PROMPTS])
def test_a_single_prompt_that_is_refused_raises(llm: LLM, prompt: Any, message: str) -> None:
    for call in (lambda: llm.generate(prompt, GREEDY, use_tqdm=False), lambda: llm.stream(prompt, GREEDY)):
        with pytest.raises(ValueError, match=re.escape(message)):
            call()


# ---- sampling parameters


class RequestOutputKind(enum.Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


VLLM_SAMPLING_DEFAULTS: dict[str, Any] = {
    "n": 1, "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0,
    "top_k": 0, "min_p": 0.0, "seed": None, "stop": None, "stop_token_ids": None, "ignore_eos": False, "max_tokens": 16,
    "min_tokens": 0, "logprobs": None, "prompt_logprobs": None, "prompt_logprob_token_ids": None, "prompt_logprob_start": None,
    "logprob_token_ids": None, "flat_logprobs": False, "detokenize": True, "skip_special_tokens": True,
    "spaces_between_special_tokens": True, "include_stop_str_in_output": False, "output_kind": RequestOutputKind.CUMULATIVE,
    "stream_interval": None, "skip_clone": False, "output_text_buffer_length": 0, "structured_outputs": None,
    "logit_bias": None, "allowed_token_ids": None, "extra_args": None, "bad_words": None, "skip_reading_prefix_cache": None,
    "thinking_token_budget": None, "repetition_detection": None, "routed_experts_prompt_start": 0,
    "trace_decode_token_ids": None,
    # of older versions
    "best_of": None, "use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "logits_processors": None,
    "guided_decoding": None, "truncate_prompt_tokens": None,
}  # fmt: skip

NEUTRAL: list[dict[str, Any]] = [
    {"n": 3, "best_of": 3}, {"top_k": -1}, {"stop": "x", "stop_token_ids": [3]}, {"bad_words": []}, {"logit_bias": {}},
    {"repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": np.float32(0)}, {"logits_processors": []},
    {"spaces_between_special_tokens": False}, {"thinking_token_budget": -1}, {"skip_reading_prefix_cache": True},
]  # fmt: skip

NOT_NEUTRAL: list[tuple[dict[str, Any], str]] = [
    ({"presence_penalty": 0.1}, "presence_penalty"),
    ({"frequency_penalty": -2}, "frequency_penalty"),
    ({"repetition_penalty": 1.05}, "repetition_penalty"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"presence_penalty": False}, "presence_penalty"),
    ({"n": 2, "best_of": 3}, "best_of"),
    ({"best_of": 2}, "best_of"),
    ({"logit_bias": {3: 1.0}}, "logit_bias"),
    ({"bad_words": ["x"]}, "bad_words"),
    ({"allowed_token_ids": [1]}, "allowed_token_ids"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"detokenize": False}, "detokenize"),
    ({"truncate_prompt_tokens": -1}, "truncate_prompt_tokens"),
    ({"output_kind": RequestOutputKind.DELTA}, "output_kind"),
    ({"structured_outputs": {"json": {}}}, "structured_outputs"),
    ({"logprob_token_ids": [3]}, "logprob_token_ids"),
    ({"logits_processors": [np.array([1])]}, "logits_processors"),
    ({"extra_args": {"x": 1}}, "extra_args"),
]


@pytest.mark.parametrize("name", VLLM_SAMPLING_DEFAULTS)
def test_every_field_of_vllms_sampling_params_may_have_its_default(name: str) -> None:
    assert SamplingParams(**{name: VLLM_SAMPLING_DEFAULTS[name]}) == SamplingParams()


def test_all_defaults_of_vllms_sampling_params_at_once_are_ours() -> None:
    assert SamplingParams(**VLLM_SAMPLING_DEFAULTS) == SamplingParams() == SamplingParams.from_dict(VLLM_SAMPLING_DEFAULTS)


@pytest.mark.parametrize("given", NEUTRAL, ids=str)
def test_a_value_that_changes_nothing_is_accepted(given: dict[str, Any]) -> None:
    own = {name: value for name, value in given.items() if name in SamplingParams.__dataclass_fields__}
    assert SamplingParams(**given) == SamplingParams(**own)


@pytest.mark.parametrize(("given", "name"), NOT_NEUTRAL, ids=str)
def test_a_value_that_would_change_the_output_is_refused_by_name(given: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}=.*: {name} is not supported; \w+"):
        SamplingParams(**given)


def test_minus_one_log_probabilities_are_those_of_the_whole_vocabulary(llm: LLM) -> None:
    (output,) = llm.generate(IDS, SamplingParams(temperature=0, max_tokens=2, logprobs=-1), use_tqdm=False)
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None and [len(row) for row in logprobs] == [331, 331]
    assert sum(np.exp(entry.logprob) for entry in logprobs[0].values()) == pytest.approx(1.0, abs=1e-4)


def test_parameters_that_change_while_a_request_runs_do_not_change_it(llm: LLM) -> None:
    params = GREEDY.clone()
    stream = llm.stream(IDS, params)
    params.max_tokens, params.n = 1, 1
    assert len(list(stream)[-1].outputs[0].token_ids) == 6


# ---- engine arguments

VLLM_ENGINE_DEFAULTS: dict[str, Any] = {
    "tokenizer": None, "tokenizer_mode": "auto", "skip_tokenizer_init": False, "trust_remote_code": False,
    "allowed_local_media_path": "", "allowed_media_domains": None, "tensor_parallel_size": 1, "dtype": "auto",
    "quantization": None, "quantization_config": None, "revision": None, "tokenizer_revision": None, "code_revision": None,
    "seed": 0, "gpu_memory_utilization": 0.9, "kv_cache_memory_bytes": None, "swap_space": 4, "cpu_offload_gb": 0,
    "enforce_eager": False, "max_seq_len_to_capture": 8192, "disable_custom_all_reduce": False,
    "disable_async_output_proc": False, "hf_token": None, "hf_overrides": {}, "mm_processor_kwargs": None,
    "override_pooler_config": None, "pooler_config": None, "compilation_config": None, "task": "auto", "runner": "auto",
    "convert": "auto", "served_model_name": None, "hf_config_path": None, "download_dir": None, "load_format": "auto",
    "config_format": "auto", "kv_cache_dtype": "auto", "max_model_len": None, "distributed_executor_backend": None,
    "pipeline_parallel_size": 1, "data_parallel_size": 1, "decode_context_parallel_size": 1, "enable_expert_parallel": False,
    "block_size": None, "enable_prefix_caching": None, "prefix_caching_hash_algo": "sha256", "disable_sliding_window": False,
    "disable_cascade_attn": False, "max_num_batched_tokens": None, "max_num_seqs": None, "max_logprobs": 20,
    "logprobs_mode": "raw_logprobs", "disable_log_stats": False, "rope_scaling": {}, "rope_theta": None,
    "limit_mm_per_prompt": {}, "enable_lora": False, "max_loras": 1, "max_lora_rank": 16, "fully_sharded_loras": False,
    "max_cpu_loras": None, "lora_dtype": "auto", "ray_workers_use_nsight": False, "num_gpu_blocks_override": None,
    "model_loader_extra_config": {}, "enable_chunked_prefill": None, "max_num_partial_prefills": 1,
    "long_prefill_token_threshold": 0, "speculative_config": None, "otlp_traces_endpoint": None,
    "collect_detailed_traces": None, "scheduling_policy": "fcfs", "kv_transfer_config": None, "worker_cls": "auto",
    "generation_config": "auto", "override_generation_config": {}, "enable_sleep_mode": False, "model_impl": "auto",
    "calculate_kv_scales": False, "additional_config": {}, "use_tqdm_on_load": True, "logits_processors": None,
    "async_scheduling": None, "attention_backend": None, "nnodes": 1, "node_rank": 0, "max_parallel_loading_workers": None,
    "structured_outputs_config": {}, "reasoning_parser": "", "guided_decoding_backend": "auto",
}  # fmt: skip

NEUTRAL_ENGINE: list[dict[str, Any]] = [
    {"block_size": 16}, {"block_size": 32, "page_size": 32}, {"kv_cache_dtype": "bfloat16", "dtype": "bfloat16"},
    {"seed": None}, {"enforce_eager": None}, {"enable_chunked_prefill": True}, {"disable_log_stats": True},
    {"revision": "main"}, {"swap_space": 0}, {"task": "generate"}, {"enable_prefix_caching": False},
]  # fmt: skip

NOT_NEUTRAL_ENGINE: list[tuple[dict[str, Any], str]] = [
    ({"block_size": 32}, "block_size=32: block_size is not supported; use page_size"),
    ({"block_size": 16, "page_size": 32}, "block_size=16: .* page_size"),
    ({"trust_remote_code": True}, "trust_remote_code=True: .*code in checkpoints is never run"),
    ({"quantization": "fp8"}, "quantization='fp8': .*float32, float16 or bfloat16"),
    ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8': .*`dtype`"),
    ({"enable_prefix_caching": True}, "enable_prefix_caching=True: .*every prompt is prefilled"),
    ({"enable_chunked_prefill": False}, "enable_chunked_prefill=False: .*max_num_batched_tokens"),
    ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2: .*tensor_parallel_size"),
    ({"data_parallel_size": 2}, "data_parallel_size=2: .*tensor_parallel_size"),
    ({"speculative_config": {"method": "ngram"}}, "speculative_config=.*: .*no speculative decoding"),
    ({"enable_lora": True}, "enable_lora=True: .*merge the adapter"),
    ({"cpu_offload_gb": 4}, "cpu_offload_gb=4: .*kv_cache_memory_bytes"),
    ({"num_gpu_blocks_override": 99}, "num_gpu_blocks_override=99: .*kv_cache_memory_bytes"),
    ({"hf_overrides": {"rope_theta": 1}}, "hf_overrides=.*: .*config.json"),
    ({"revision": "v2"}, "revision='v2': .*give its folder as model"),
    ({"task": "embed"}, "task='embed': .*decoded only"),
    ({"generation_config": "vllm"}, "generation_config='vllm': .*SamplingParams"),
    ({"logprobs_mode": "processed_logprobs"}, "logprobs_mode=.*: .*raw logits"),
    ({"distributed_executor_backend": "mp"}, "distributed_executor_backend='mp' is not known; use one of 'auto', 'ray', 'uni'"),
]


@pytest.mark.parametrize("name", VLLM_ENGINE_DEFAULTS)
def test_an_argument_of_vllms_engine_may_have_its_default(name: str) -> None:
    assert EngineConfig.from_dict({"model": "m", name: VLLM_ENGINE_DEFAULTS[name]}) == EngineConfig(model="m")


def test_all_defaults_of_vllms_engine_at_once_are_ours() -> None:
    assert EngineConfig.from_dict({"model": "m", **VLLM_ENGINE_DEFAULTS}, "LLM") == EngineConfig(model="m")


@pytest.mark.parametrize("given", NEUTRAL_ENGINE, ids=str)
def test_an_engine_argument_that_changes_nothing_is_accepted(given: dict[str, Any]) -> None:
    own = {name: value for name, value in given.items() if name not in ENGINE}
    assert EngineConfig.from_dict({"model": "m", **given}) == EngineConfig.from_dict({"model": "m", **own})


@pytest.mark.parametrize(("given", "message"), NOT_NEUTRAL_ENGINE, ids=str)
def test_an_engine_argument_that_would_change_something_is_refused_with_what_to_do(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(model="m", **given)


# ---- calls


def test_arguments_of_generate_and_chat_that_change_nothing_are_accepted_and_others_are_named(llm: LLM) -> None:
    (plain,) = llm.generate(prompts=[IDS], sampling_params=GREEDY, use_tqdm=False, lora_request=None, priority=None)
    assert len(plain.outputs[0].token_ids) == 6
    with pytest.raises(ValueError, match=r"^prompt_token_ids=\[\[1\]\]: .*give token ids as `prompts`"):
        llm.generate(prompt_token_ids=[[1]], sampling_params=GREEDY)
    with pytest.raises(ValueError, match=r"^lora_request='a': .*merge the adapter"):
        llm.chat([{"role": "user", "content": "x"}], GREEDY, lora_request="a")
    with pytest.raises(ValueError, match=r"generate: unknown key 'samplng_params'; did you mean 'sampling_params'"):
        llm.generate([IDS], samplng_params=GREEDY)


def test_template_arguments_may_come_in_vllms_dict(path: Path) -> None:
    template = "{{ bos_token }}{{ 'on' if thinking else 'off' }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with make_llm(text_checkpoint(path.parent / "thinking", template), max_model_len=64) as llm:
        messages = [{"role": "user", "content": " fox"}]
        for given, text in (({"thinking": True}, "<s>on fox"), (None, "<s>off fox")):
            (output,) = llm.chat(messages, GREEDY, use_tqdm=False, chat_template_kwargs=given)
            assert llm.get_tokenizer().decode(output.prompt_token_ids) == text


# ---- the checkpoint's own defaults


def write_generation_config(folder: Path, **keys: Any) -> Path:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, **keys}), encoding="utf-8")
    return folder


def test_generate_without_parameters_takes_the_checkpoints_generation_config(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text_checkpoint(tmp_path)
    write_generation_config(tmp_path, temperature=0.5, top_k=1, top_p=0.9, max_new_tokens=3, repetition_penalty=1.05)
    with make_llm(tmp_path, max_model_len=64) as llm, caplog.at_level(logging.WARNING, "distributed_sparse"):
        assert llm.get_default_sampling_params() == SamplingParams(temperature=0.5, top_k=1, top_p=0.9, max_tokens=3)
        greedy = llm.generate(IDS, SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)[0].outputs
        for outputs in (llm.generate(IDS, use_tqdm=False)[0].outputs, list(llm.stream(IDS))[-1].outputs):
            assert outputs == greedy
        changed = llm.get_default_sampling_params()
        changed.max_tokens = 2
        assert llm.get_default_sampling_params().max_tokens == 3
    named = [record.getMessage() for record in caplog.records if "repetition_penalty" in record.getMessage()]
    assert len(named) == 1 and "repetition_penalty=1.05 is not applied" in named[0]


def test_a_generation_config_that_says_nothing_gives_vllms_defaults(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert default_sampling_params(tmp_path) == SamplingParams()
    neutral = {
        "do_sample": True,
        "repetition_penalty": 1.0,
        "num_beams": 1,
        "top_k": None,
        "suppress_tokens": [],
        "max_length": 9,
    }
    assert default_sampling_params(write_generation_config(tmp_path, **neutral)) == SamplingParams()
    assert not caplog.records


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"do_sample": False}, "do_sample=False"),
        ({"no_repeat_ngram_size": 3, "typical_p": 0.9}, "typical_p=0.9, no_repeat_ngram_size=3"),
        ({"suppress_tokens": [4]}, "suppress_tokens=[4]"),
    ],
)
def test_what_is_not_applied_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, keys: dict[str, Any], named: str
) -> None:
    assert default_sampling_params(write_generation_config(tmp_path, **keys)) == SamplingParams()
    assert f"{named} is not applied" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"temperature": "0.7"}', r"generation_config.json: temperature='0.7' must be a number"),
        ('{"top_p": 1.5}', r"generation_config.json: top_p=1.5 must be"),
        ("[1]", r"generation_config.json holds \[1\], not an object"),
        ("{", r"generation_config.json is not valid JSON"),
    ],
)
def test_a_malformed_generation_config_is_refused_by_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        default_sampling_params(tmp_path)
