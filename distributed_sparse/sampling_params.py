"""SamplingParams: how one request's tokens are drawn, and when they end. Plain fields, no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from distributed_sparse.validation import check_bool, check_float, check_int, check_text, nearest_key, shown

# vLLM's parameters that this engine does not have: refused by name, since dropping one in silence would change the output.
NOT_SUPPORTED = {
    "presence_penalty": "remove it; no penalties are applied",
    "frequency_penalty": "remove it; no penalties are applied",
    "repetition_penalty": "remove it; no penalties are applied",
    "repetition_detection": "remove it, or end on `stop` or `timeout_s`",
    "length_penalty": "remove it; there is no beam search",
    "early_stopping": "remove it; there is no beam search",
    "use_beam_search": "remove it; there is no beam search",
    "best_of": "use `n` and `logprobs`, and rank the completions by cumulative_logprob",
    "logit_bias": "remove it; logits are masked by top_k, top_p and min_p only",
    "bad_words": "remove it; logits are masked by top_k, top_p and min_p only",
    "allowed_token_ids": "remove it; logits are masked by top_k, top_p and min_p only",
    "logits_processors": "remove it; logits are masked by top_k, top_p and min_p only",
    "structured_outputs": "remove it; output is not constrained by a grammar",
    "guided_decoding": "remove it; output is not constrained by a grammar",
    "detokenize": "remove it; text is made wherever there is a tokenizer, and token_ids are always given",
    "skip_special_tokens": "remove it; special tokens are never in the text, and always in token_ids",
    "spaces_between_special_tokens": "remove it; special tokens are never in the text",
    "truncate_prompt_tokens": "cut the prompt's token ids before the call",
    "output_kind": "use LLM.generate for final outputs and LLM.stream for growing ones",
    "flat_logprobs": "remove it; logprobs are one dict per token",
    "logprob_token_ids": "use LLM.score for log-probabilities of given tokens",
    "thinking_token_budget": "bound the output with max_tokens",
    "skip_reading_prefix_cache": "remove it; there is no prefix cache",
    "extra_args": "remove it; nothing reads it",
}

MIN_TEMPERATURE = 1e-5  # below it logits / temperature leaves float32's range


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. Names and meanings are vLLM's, but for the last three, which are this engine's own.

    Attributes:
        n: completions of the prompt, which is prefilled once.
        temperature: divides the logits; 0 is greedy, else at least 1e-5.
        top_p: keep the smallest set of tokens with this probability, in (0, 1].
        top_k: keep the k most likely tokens; 0 (or -1) keeps all.
        min_p: keep tokens with at least this share of the most likely one's probability, in [0, 1].
        max_tokens: most tokens to generate, at least 1; None: as many as max_model_len has room for.
        min_tokens: before so many tokens neither end-of-sequence, `stop_token_ids` nor `stop` end the output.
        stop: strings (one, or a list) that end the output; needs a tokenizer.
        stop_token_ids: tokens that end the output, beside the checkpoint's end-of-sequence tokens.
        include_stop_str_in_output: keep what stopped in the text.
        ignore_eos: go on past the checkpoint's end-of-sequence tokens.
        seed: makes the draws repeatable; None is derived once at admission from the engine's seed.
        logprobs: log-probabilities of so many most likely tokens per output position, and of the sampled one.
        prompt_logprobs: the same per prompt position; -1 is the whole vocabulary.
        decode_last_prompt_tokens: k < prompt length: so many last prompt tokens go through sparse decode, one per step.
        trace_steps: of an engine with `trace`: which of the request's decode steps are traced, 0 the first; None: all.
        timeout_s: seconds from arrival after which the request is ended with an error; None: no limit.

    Raises:
        ValueError: names the parameter, its value and the remedy; vLLM's parameters that are missing are refused by name.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Sequence[str] = field(default_factory=list)
    stop_token_ids: Sequence[int] = field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    decode_last_prompt_tokens: int = 0
    trace_steps: Sequence[int] | None = None
    timeout_s: float | None = None

    def __new__(cls, *args: Any, **given: Any) -> "SamplingParams":
        # Names are looked at before the dataclass's own __init__, whose TypeError would say nothing of the remedy.
        if args:
            raise ValueError(f"SamplingParams({shown(args[0])}) has no name; write SamplingParams(temperature=0.0, ...)")
        _check_names(given)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        def put_int(name: str, low: int, remedy: str, high: int | None = None) -> None:
            put(name, check_int(name, getattr(self, name), low, high, remedy=remedy))

        put_int("n", 1, "give the number of completions")
        remedy = f"use 0 for greedy decoding, else {MIN_TEMPERATURE:g} or more"
        put("temperature", check_float("temperature", self.temperature, 0.0, remedy=remedy))
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(f"temperature={self.temperature} is too small to divide logits by; {remedy}")
        remedy = "use 1.0 to keep all tokens"
        put("top_p", check_float("top_p", self.top_p, 0.0, 1.0, low_excluded=True, remedy=remedy))
        put_int("top_k", -1, "use 0 to keep all tokens", (1 << 31) - 1)
        put("top_k", max(self.top_k, 0))
        put("min_p", check_float("min_p", self.min_p, 0.0, 1.0, remedy="use 0.0 to keep all tokens"))
        if self.max_tokens is not None:
            put_int("max_tokens", 1, "give the most tokens to generate, or None for what max_model_len has room for")
        put_int("min_tokens", 0, "use 0 to let the output end at once")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}; lower the first or raise the second"
            )
        put("stop", _checked_stop(self.stop))
        put("stop_token_ids", _checked_stop_token_ids(self.stop_token_ids))
        check_bool("include_stop_str_in_output", self.include_stop_str_in_output)
        check_bool("ignore_eos", self.ignore_eos)
        if self.seed is not None:
            put_int("seed", 0, "give an unsigned 63-bit number, or None to derive one", (1 << 63) - 1)
        if self.logprobs is not None:
            put_int("logprobs", 0, "give a number of tokens, or None for no log-probabilities")
        if self.prompt_logprobs is not None:
            put_int("prompt_logprobs", -1, "give a number of tokens, -1 for the whole vocabulary, or None")
        put_int("decode_last_prompt_tokens", 0, "use 0 to prefill the whole prompt densely")
        if self.trace_steps is not None:
            if not isinstance(self.trace_steps, Sequence) or isinstance(self.trace_steps, (str, bytes, bytearray)):
                raise ValueError(
                    f"trace_steps={shown(self.trace_steps)} must be a list of step numbers; [0] is the first decode step"
                )
            remedy = "give numbers of decode steps, 0 the first"
            put("trace_steps", [check_int("trace_steps: step", step, 0, remedy=remedy) for step in self.trace_steps])
        if self.timeout_s is not None:
            remedy = "give seconds, or None for no limit"
            put("timeout_s", check_float("timeout_s", self.timeout_s, 0.0, low_excluded=True, remedy=remedy))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, with no draw."""
        return self.temperature == 0.0

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "SamplingParams":
        """The parameters that `given` names, the rest at their defaults. Raises ValueError as the constructor does."""
        return cls().updated(given)

    def updated(self, given: Mapping[str, Any]) -> "SamplingParams":
        """These parameters with those of `given` in their place. Raises ValueError as the constructor does."""
        if not isinstance(given, Mapping):
            raise ValueError(f"sampling parameters {shown(given)} must be a mapping, such as {{'temperature': 0.0}}")
        _check_names(given)
        return replace(self, **given)


def _check_names(given: Mapping[str, Any]) -> None:
    valid = [f.name for f in fields(SamplingParams)]
    for name in given:
        if name in NOT_SUPPORTED:
            raise ValueError(f"{name}={shown(given[name])}: {name} is not supported; {NOT_SUPPORTED[name]}")
        if name not in valid:
            near = nearest_key(str(name), valid)
            hint = f"did you mean {near!r}? " if near else ""
            raise ValueError(f"{name}={shown(given[name])}: unknown sampling parameter; {hint}known: {', '.join(valid)}")


def _checked_stop(stop: Any) -> list[str]:
    if stop is None:
        return []
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or isinstance(strings, (bytes, bytearray)):
        raise ValueError(f"stop={shown(stop)} must be a string or a list of strings; give for instance stop=['\\n\\n']")
    return list(dict.fromkeys(check_text("stop: string", string, "give strings of valid Unicode") for string in strings))


def _checked_stop_token_ids(token_ids: Any) -> list[int]:
    if token_ids is None:
        return []
    if not isinstance(token_ids, Sequence) or isinstance(token_ids, (str, bytes, bytearray)):
        raise ValueError(f"stop_token_ids={shown(token_ids)} must be a list of token ids; give for instance [2]")
    remedy = "give ids of the model's vocabulary"
    return list(dict.fromkeys(check_int("stop_token_ids: token id", token, 0, remedy=remedy) for token in token_ids))
