"""vllm_names: vLLM parameters that this engine does not support.

A neutral value, which changes nothing, is accepted. Any other value is rejected with a remedy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from numbers import Real
from typing import Any

from distributed_sparse.utils.validation import shown

ANY = object()
"""Marks a parameter that has no effect here: every value is neutral."""


@dataclass(frozen=True)
class _SameAs:
    """Neutral value equal to the engine's own parameter `name`."""

    name: str


_NOTHING: tuple[Any, ...] = (None, [], (), {}, "")

SAMPLING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), ("remove it; no penalties are applied", None, 0.0)),
    "repetition_penalty": ("remove it; no penalties are applied", None, 1.0),
    "repetition_detection": ("remove it, or end on `stop` or `timeout_s`", None),
    "length_penalty": ("remove it; there is no beam search", None, 1.0),
    **dict.fromkeys(("early_stopping", "use_beam_search"), ("remove it; there is no beam search", None, False)),
    "best_of": ("use `n` and `logprobs`, and rank the completions by cumulative_logprob", None, _SameAs("n")),
    **dict.fromkeys(
        ("logit_bias", "bad_words", "logits_processors"),
        ("remove it; logits are masked by top_k, top_p and min_p only", *_NOTHING),
    ),
    "allowed_token_ids": ("remove it; logits are masked by top_k, top_p and min_p only", None),
    **dict.fromkeys(("structured_outputs", "guided_decoding"), ("remove it; output is not constrained by a grammar", None)),
    "detokenize": ("remove it; outputs have token_ids, and text if there is a tokenizer", True),
    "skip_special_tokens": ("remove it; special tokens are never in the text, and always in token_ids", True),
    "truncate_prompt_tokens": ("cut the prompt's token ids before the call", None),
    "output_kind": ("use LLM.generate for final outputs and LLM.stream for growing ones", None, "CUMULATIVE"),
    "flat_logprobs": ("remove it; logprobs are one dict per token", False),
    "logprob_token_ids": ("use LLM.score for log-probabilities of given tokens", None),
    "prompt_logprob_token_ids": ("use LLM.score for log-probabilities of given tokens", None),
    "prompt_logprob_start": ("use LLM.score for log-probabilities of given tokens", None, 0),
    "thinking_token_budget": ("bound the output with max_tokens", None, -1),
    "stream_interval": ("remove it; LLM.stream yields every token", None, 1),
    "extra_args": ("remove it; nothing reads it", *_NOTHING),
    "routed_experts_prompt_start": ("remove it; there are no experts", None, 0),
    "trace_decode_token_ids": ("use LLM.score with decode_last_prompt_tokens to decode given tokens", None),
    **dict.fromkeys(  # special tokens are never in the text; there is no prefix cache; the last two are internal to vLLM
        ("spaces_between_special_tokens", "skip_reading_prefix_cache", "skip_clone", "output_text_buffer_length"), ("", ANY)
    ),
}
"""Parameter of vLLM's SamplingParams -> (remedy, neutral values...)."""

_NO_PARALLEL = "remove it; only the heads are sharded: use tensor_parallel_size"
_NO_LORA = "remove it; merge the adapter into the checkpoint"
_NO_MEDIA = "remove it; only text models are decoded"
_NO_DRAFT = ("remove it; there is no speculative decoding", None)
_CHECKPOINT = "edit a copy of the checkpoint's config.json"
_HUB = "download that revision and give its folder as model"
_PREFILL = "remove it; prompts are prefilled in chunks, in order of arrival, beside the running sequences"
_NO_OFFLOAD = "remove it; use more ranks, or a smaller kv_cache_memory_bytes"

ENGINE: dict[str, tuple[Any, ...]] = {
    "block_size": ("use page_size", None, _SameAs("page_size")),
    "kv_cache_dtype": ("remove it; keys and values are kept in `dtype`", None, "auto", _SameAs("dtype")),
    "num_gpu_blocks_override": ("use kv_cache_memory_bytes", None),
    "quantization": ("use a checkpoint in float32, float16 or bfloat16", None),
    "quantization_config": ("use a checkpoint in float32, float16 or bfloat16", *_NOTHING),
    "trust_remote_code": ("remove it; code in checkpoints is never run", None, False),
    "enable_prefix_caching": ("remove it; every prompt is prefilled", None, False),
    "enable_chunked_prefill": ("remove it; prompts are always prefilled in chunks of max_num_batched_tokens", None, True),
    **dict.fromkeys(("task", "runner", "convert"), ("remove it; models are decoded only", None, "auto", "generate", "none")),
    **dict.fromkeys(("pooler_config", "override_pooler_config"), ("remove it; models are decoded only", None)),
    "skip_tokenizer_init": ("remove it; token ids need no tokenizer", None, False),
    "tokenizer_mode": ("remove it; only tokenizers with a tokenizer.json are read", None, "auto", "hf"),
    "config_format": ("remove it; config.json is read", None, "auto", "hf"),
    "model_impl": ("remove it; there is one implementation per model family", None, "auto"),
    **dict.fromkeys(("revision", "tokenizer_revision", "code_revision"), (_HUB, None, "main")),
    "download_dir": ("set HF_HOME, or give a local folder as model", None),
    "hf_token": ("set HF_TOKEN", None),
    **dict.fromkeys(("hf_overrides", "rope_scaling"), (_CHECKPOINT, *_NOTHING)),
    **dict.fromkeys(("rope_theta", "hf_config_path", "override_attention_dtype"), (_CHECKPOINT, None)),
    "disable_sliding_window": ("set max_model_len to the window or less", None, False),
    "generation_config": ("give SamplingParams to each call to override the checkpoint's defaults", None, "auto"),
    "override_generation_config": ("give SamplingParams to each call", *_NOTHING),
    **dict.fromkeys(
        ("pipeline_parallel_size", "data_parallel_size", "prefill_context_parallel_size", "decode_context_parallel_size"),
        (_NO_PARALLEL, None, 1),
    ),
    **dict.fromkeys(("enable_expert_parallel", "enable_eplb", "enable_dbo"), (_NO_PARALLEL, None, False)),
    "nnodes": ("remove it; Ray places the ranks on its nodes", None, 1),
    "node_rank": ("remove it; Ray places the ranks on its nodes", None, 0),
    **dict.fromkeys(("data_parallel_rank", "data_parallel_size_local", "data_parallel_address"), (_NO_PARALLEL, None)),
    **dict.fromkeys(("enable_lora", "enable_lora_bias", "enable_prompt_adapter"), (_NO_LORA, None, False)),
    "default_mm_loras": (_NO_LORA, *_NOTHING),
    **dict.fromkeys(
        ("limit_mm_per_prompt", "mm_processor_kwargs", "media_io_kwargs", "allowed_local_media_path", "allowed_media_domains"),
        (_NO_MEDIA, *_NOTHING),
    ),
    **dict.fromkeys(("enable_mm_embeds", "enable_prompt_embeds", "interleave_mm_strings"), (_NO_MEDIA, None, False)),
    **dict.fromkeys(("speculative_config", "speculative_model", "num_speculative_tokens"), _NO_DRAFT),
    "cpu_offload_gb": (_NO_OFFLOAD, None, 0),
    "kv_offloading_size": (_NO_OFFLOAD, None),
    "kv_transfer_config": ("remove it; the KV cache is not transferred", None),
    "calculate_kv_scales": ("remove it; keys and values are kept in `dtype`", None, False),
    "scheduling_policy": (_PREFILL, None, "fcfs"),
    "scheduler_cls": (_PREFILL, None),
    "scheduler_delay_factor": (_PREFILL, None, 0.0),
    **dict.fromkeys(("max_num_partial_prefills", "max_long_partial_prefills", "num_scheduler_steps"), (_PREFILL, None, 1)),
    "long_prefill_token_threshold": (_PREFILL, None, 0),
    "preemption_mode": ("remove it; a running request is never preempted", None),
    "logprobs_mode": ("remove it; log-probabilities are of the raw logits", None, "raw_logprobs"),
    "logits_processors": ("remove it; logits are masked by top_k, top_p and min_p only", *_NOTHING),
    "compilation_config": ("remove it; enforce_eager=True runs without CUDA graphs", *_NOTHING),
    "cudagraph_capture_sizes": ("remove it; enforce_eager=True runs without CUDA graphs", *_NOTHING),
    **dict.fromkeys(("attention_backend", "attention_config"), ("use `sparse` to choose an attention method", *_NOTHING)),
    "worker_cls": ("remove it", None, "auto"),
    **dict.fromkeys(("worker_extension_cls", "additional_config", "model_loader_extra_config"), ("remove it", *_NOTHING)),
    "enable_sleep_mode": ("use LLM.shutdown, and a new LLM later", None, False),
    **dict.fromkeys(("otlp_traces_endpoint", "collect_detailed_traces"), ("use LLM.stats", None)),
    "max_cpu_loras": (_NO_LORA, None),
    **dict.fromkeys(
        (
            # nothing is swapped; no limit below the vocabulary; steps are not logged; all-reduce is torch's
            "swap_space", "max_logprobs", "disable_log_stats", "disable_log_requests", "disable_custom_all_reduce",
            # tuning of vLLM's own components
            "max_seq_len_to_capture", "max_parallel_loading_workers", "disable_async_output_proc", "disable_cascade_attn",
            "ray_workers_use_nsight", "stream_interval", "use_v2_block_manager", "prefix_caching_hash_algo",
            "optimization_level", "performance_mode", "max_cudagraph_capture_size",
            # details of unsupported features, whose switches are rejected above
            "max_loras", "max_lora_rank", "lora_dtype", "lora_extra_vocab_size", "fully_sharded_loras",
            "guided_decoding_backend", "structured_outputs_config", "reasoning_parser", "mm_processor_cache_gb",
            "data_parallel_backend", "master_addr", "master_port", "served_model_name",
        ),
        ("", ANY),
    ),
}  # fmt: skip
"""Argument of vLLM's LLM and EngineArgs -> (remedy, neutral values...)."""

CALL: dict[str, tuple[Any, ...]] = {
    "prompt_token_ids": ("give token ids as `prompts`", None),
    "lora_request": (_NO_LORA, *_NOTHING),
    "prompt_adapter_request": (_NO_LORA, None),
    "guided_options_request": ("remove it; output is not constrained by a grammar", None),
    "priority": (_PREFILL, *_NOTHING),
    "tokenization_kwargs": ("tokenize the prompt yourself and give token ids", *_NOTHING),
    "mm_processor_kwargs": (_NO_MEDIA, *_NOTHING),
}
"""Argument of vLLM's LLM.generate and LLM.chat -> (remedy, neutral values...)."""

PROMPT: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("multi_modal_data", "multi_modal_uuids", "mm_processor_kwargs"), (_NO_MEDIA, *_NOTHING)),
    **dict.fromkeys(("encoder_prompt", "decoder_prompt"), ("give a prompt; models are decoder-only", None)),
    "prompt_embeds": ("give token ids", None),
    "token_type_ids": ("remove it; models are decoder-only", None),
    "cache_salt": ("", ANY),  # no prefix is shared between requests
}
"""Key of vLLM's TextPrompt, TokensPrompt and other prompt types -> (remedy, neutral values...)."""


def drop_neutral(
    given: Mapping[str, Any], table: Mapping[str, tuple[Any, ...]], own: Mapping[str, Any] | None = None, where: str = ""
) -> dict[str, Any]:
    """Return `given` without the parameters in `table`, after checking that their values are neutral.

    Args:
        own: the engine's own parameters, for parameters that must equal one of them (`best_of` must equal `n`).
        where: prefix of the error message.

    Raises:
        ValueError: a value is not neutral; the message names the parameter, its value and the remedy.
    """
    for name in given:
        if name in table:
            remedy, *neutrals = table[name]
            if not any(_is_neutral(given[name], neutral, own or {}) for neutral in neutrals):
                raise ValueError(f"{where}{name}={shown(given[name])}: {name} is not supported; {remedy}")
    return {name: value for name, value in given.items() if name not in table}


def _is_neutral(value: Any, neutral: Any, own: Mapping[str, Any]) -> bool:
    if neutral is ANY:
        return True
    if isinstance(neutral, _SameAs):
        return neutral.name in own and _is_neutral(value, own[neutral.name], {})
    if value is None or neutral is None:
        return value is neutral
    if isinstance(value, Enum):
        value = value.name
    plain = isinstance(value, (Real, str, list, tuple, dict))  # comparing an array would return an array
    return plain and isinstance(value, bool) == isinstance(neutral, bool) and value == neutral
