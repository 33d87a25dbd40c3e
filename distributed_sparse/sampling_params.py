"""sampling_params: SamplingParams, the sampling and stopping parameters of one request. Imports no torch."""

import copy
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from distributed_sparse.utils.validation import check_bool, check_float, check_int, check_text, nearest_key, shown
from distributed_sparse.utils.vllm_names import SAMPLING, drop_neutral

T = TypeVar("T")

MAX_STOP_STRINGS = 64
MAX_STOP_CHARACTERS = 16_384
"""Total over all stop strings. The Driver spends 2 us per character before the request's first token."""

MIN_TEMPERATURE = 1e-5  # below it logits / temperature leaves float32's range


def _with_vllm_names(cls: type[T]) -> type[T]:
    """Make the constructor accept unsupported parameters of vLLM at values that change nothing."""
    init = cls.__init__

    @functools.wraps(init)
    def checked_init(self: T, *args: Any, **given: Any) -> None:
        if args:
            raise ValueError(f"SamplingParams({shown(args[0])}) has no name; write SamplingParams(temperature=0.0, ...)")
        init(self, **_own_parameters(given, {"n": 1}))

    cls.__init__ = checked_init  # type: ignore[assignment]
    return cls


@_with_vllm_names
@dataclass(kw_only=True)
class SamplingParams:
    """Sampling parameters of one request. Names and meanings are vLLM's, except the last three, which only this engine has.

    Assigning an attribute validates it as the constructor does. An engine copies the object it is given. Unsupported
    parameters of vLLM are accepted at values that change nothing (`repetition_penalty=1.0`).

    Attributes:
        n: number of completions; the prompt is prefilled once for all of them.
        temperature: divisor of the logits; 0 for greedy sampling, else at least 1e-5.
        top_p: keep the smallest set of tokens whose total probability reaches this value, in (0, 1].
        top_k: keep the k most likely tokens; 0 (or -1) keeps all.
        min_p: keep tokens with at least this fraction of the most likely token's probability, in [0, 1].
        max_tokens: maximum tokens to generate, at least 1; None: up to max_model_len.
        min_tokens: ignore end-of-sequence, `stop_token_ids` and `stop` until this many tokens are generated.
        stop: a string, or a list of at most 64, that ends the output; needs a tokenizer. A stop string that contains a special
            token, such as "<|im_end|>", ends the output at that token.
        stop_token_ids: tokens that end the output, in addition to the checkpoint's end-of-sequence tokens.
        include_stop_str_in_output: keep the stop string in the text.
        ignore_eos: continue after the checkpoint's end-of-sequence tokens.
        seed: seed for reproducible sampling; None (or -1): derived from the engine's seed at admission.
        logprobs: number of most likely tokens per output position whose log-probabilities are returned, in addition to the
            sampled token's; -1: the whole vocabulary.
        prompt_logprobs: the same per prompt position.
        decode_last_prompt_tokens: number of last prompt tokens that go through sparse decode, one per step; must be less
            than the prompt length.
        trace_steps: the request's decode steps to trace, counted from 0, in an engine with trace=True; None: all.
        timeout_s: seconds from arrival after which the request fails; None: no limit.

    Raises:
        ValueError: a parameter is invalid; the message names it, its value and the remedy.
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

    def __setattr__(self, name: str, value: Any) -> None:
        if len(self.__dict__) < len(fields(self)):  # in the constructor, which validates in __post_init__
            object.__setattr__(self, name, value)
        else:
            self.__dict__.update(self.updated({name: value}).__dict__)

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
            put_int("max_tokens", 1, "give the maximum number of tokens, or None to generate up to max_model_len")
        put_int("min_tokens", 0, "use 0 for no minimum")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}; lower the first or raise the second"
            )
        put("stop", _checked_stop(self.stop))
        put("stop_token_ids", _checked_stop_token_ids(self.stop_token_ids))
        check_bool("include_stop_str_in_output", self.include_stop_str_in_output)
        check_bool("ignore_eos", self.ignore_eos)
        if self.seed is not None:
            put_int("seed", -1, "give an unsigned 63-bit number, or None to derive one", (1 << 63) - 1)
            put("seed", None if self.seed == -1 else self.seed)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:
                put(name, 1)
            elif getattr(self, name) is not None:
                put_int(name, -1, "give a number of tokens, -1 for the whole vocabulary, or None")
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
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> "SamplingParams":
        """Make SamplingParams from `given`, with defaults for the rest. Raises ValueError as the constructor does."""
        return cls().updated(given)

    def updated(self, given: Mapping[str, Any]) -> "SamplingParams":
        """Return a copy with the parameters of `given` replaced. Raises ValueError as the constructor does."""
        if not isinstance(given, Mapping):
            raise ValueError(f"sampling parameters {shown(given)} must be a mapping, such as {{'temperature': 0.0}}")
        return replace(self, **_own_parameters(given, self.__dict__))

    def clone(self) -> "SamplingParams":
        """Return a deep copy."""
        return copy.deepcopy(self)


def _own_parameters(given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return `given` without unsupported parameters of vLLM. Raises ValueError if one has an effect, or a name is unknown."""
    valid = [f.name for f in fields(SamplingParams)]
    given = drop_neutral(given, SAMPLING, {**own, **given})
    for name in given:
        if name not in valid:
            near = nearest_key(str(name), valid)
            hint = f"did you mean {near!r}? " if near else ""
            raise ValueError(f"{name}={shown(given[name])}: unknown sampling parameter; {hint}known: {', '.join(valid)}")
    return given


def _checked_stop(stop: Any) -> list[str]:
    if stop is None:
        return []
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or isinstance(strings, (bytes, bytearray)):
        raise ValueError(f"stop={shown(stop)} must be a string or a list of strings; give for instance stop=['\\n\\n']")
    distinct = list(dict.fromkeys(check_text("stop: string", string, "give strings of valid Unicode") for string in strings))
    if len(distinct) > MAX_STOP_STRINGS:
        raise ValueError(f"stop holds {len(distinct)} strings, over the limit of {MAX_STOP_STRINGS}; give fewer")
    if (length := sum(map(len, distinct))) > MAX_STOP_CHARACTERS:
        raise ValueError(
            f"stop holds {length} characters, over the limit of {MAX_STOP_CHARACTERS}; give fewer or shorter strings"
        )
    return distinct


def _checked_stop_token_ids(token_ids: Any) -> list[int]:
    if token_ids is None:
        return []
    if not isinstance(token_ids, Sequence) or isinstance(token_ids, (str, bytes, bytearray)):
        raise ValueError(f"stop_token_ids={shown(token_ids)} must be a list of token ids; give for instance [2]")
    remedy = "give ids of the model's vocabulary"
    return list(dict.fromkeys(check_int("stop_token_ids: token id", token, 0, remedy=remedy) for token in token_ids))
