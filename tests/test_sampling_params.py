"""What a user may ask of a request, and how the engine says no: by the parameter's name, its value and the remedy."""

import math
import pickle
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distributed_sparse.driver.request_validation import validate_request
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.utils.vllm_names import ANY, SAMPLING, drop_neutral

VOCAB_SIZE, MAX_MODEL_LEN, MAX_NUM_SEQS = 331, 256, 8


def check(prompt: Any, params: Any, has_tokenizer: bool = True, **kwargs: Any) -> None:
    limits: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "max_model_len": MAX_MODEL_LEN, "max_num_seqs": MAX_NUM_SEQS}
    validate_request(prompt, params, **limits, has_tokenizer=has_tokenizer, **kwargs)


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.min_p) == (1, 1.0, 1.0, 0, 0.0)
    assert (params.max_tokens, params.min_tokens, params.stop, params.stop_token_ids) == (16, 0, [], [])
    assert params.seed is None and params.logprobs is None and params.prompt_logprobs is None


def test_temperature_zero_is_greedy_and_nothing_else_is() -> None:
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=1e-5).greedy


def test_the_ways_to_write_the_same_thing_become_one() -> None:
    assert SamplingParams(stop="\n").stop == ["\n"] == SamplingParams(stop=("\n", "\n")).stop
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()  # type: ignore[arg-type]
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(logprobs=True, prompt_logprobs=True) == SamplingParams(logprobs=1, prompt_logprobs=1)
    of_numpy: dict[str, Any] = {"max_tokens": np.int64(3), "temperature": np.float32(0.5), "stop_token_ids": [np.int32(4)]}
    params = SamplingParams(**of_numpy)
    assert (type(params.max_tokens), type(params.temperature), type(params.stop_token_ids[0])) == (int, float, int)


def test_parameters_cross_to_another_process_unchanged() -> None:
    params = SamplingParams(n=2, stop=["a"], stop_token_ids=[3], seed=(1 << 63) - 1, logprobs=0, timeout_s=1.5, max_tokens=None)
    assert pickle.loads(pickle.dumps(params)) == params
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_one_parameter_can_be_replaced_and_is_checked_again() -> None:
    params = SamplingParams(max_tokens=5).updated({"temperature": 0})
    assert (params.max_tokens, params.greedy) == (5, True)
    with pytest.raises(ValueError, match=r"min_tokens=6 is above max_tokens=5"):
        params.updated({"min_tokens": 6})


def test_a_parameter_that_is_assigned_later_is_checked_like_one_that_is_given() -> None:
    params = SamplingParams(max_tokens=5, n=2)
    params.temperature, params.stop, params.best_of = 0, "\n", 2  # type: ignore[assignment,attr-defined]
    assert params == SamplingParams(max_tokens=5, n=2, temperature=0.0, stop=["\n"])
    for name, value in (("min_tokens", 6), ("top_p", 7), ("presence_penalty", 0.5), ("temprature", 0)):
        with pytest.raises(ValueError, match=rf"^{name}={value}"):
            setattr(params, name, value)
    assert params == SamplingParams(max_tokens=5, n=2, temperature=0.0, stop=["\n"])


def test_a_clone_shares_nothing_with_its_original() -> None:
    params = SamplingParams(stop=["a"], stop_token_ids=[3], seed=4)
    clone = params.clone()
    assert clone == params
    clone.seed, clone.stop = 5, ["b"]
    clone.stop_token_ids.append(9)  # type: ignore[attr-defined]
    assert params == SamplingParams(stop=["a"], stop_token_ids=[3], seed=4)


REFUSED_VALUES: dict[str, Any] = {
    "logit_bias": {3: 1.0},
    "bad_words": ["x"],
    "allowed_token_ids": [],
    "detokenize": False,
    "skip_special_tokens": False,
    "output_kind": "DELTA",
    "repetition_penalty": np.array([1.0, 1.05]),
}
HARMLESS = {name for name, (_, *neutrals) in SAMPLING.items() if neutrals[-1] is ANY}


@pytest.mark.parametrize("name", sorted(SAMPLING.keys() - HARMLESS))
def test_a_parameter_of_vllm_that_is_missing_is_refused_by_name(name: str) -> None:
    given: dict[str, Any] = {name: REFUSED_VALUES.get(name, 0.5)}
    for build in (lambda: SamplingParams(**given), lambda: SamplingParams.from_dict(given)):
        with pytest.raises(ValueError, match=rf"^{name}=.*: {name} is not supported; .+"):
            build()


def test_an_unknown_parameter_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ValueError, match=r"^temprature=0: unknown sampling parameter; did you mean 'temperature'\?"):
        SamplingParams(temprature=0)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"has no name"):
        SamplingParams(3)  # type: ignore[misc]


NOT_INTS = [True, 1.0, "1", math.nan, None, [1]]
NOT_FLOATS = [True, "1", math.nan, math.inf, -math.inf, None, 10**400, 1j]
BAD_VALUES: dict[str, list[Any]] = {
    "n": [*NOT_INTS, 0, -1],
    "temperature": [*NOT_FLOATS, -0.1, 1e-9],
    "top_p": [*NOT_FLOATS, 0.0, -0.5, 1.01],
    "top_k": [*NOT_INTS, -2],
    "min_p": [*NOT_FLOATS, -0.1, 1.1],
    "max_tokens": [*(v for v in NOT_INTS if v is not None), 0, -3],
    "min_tokens": [*NOT_INTS, -1, 17],
    "stop": [1, "", [""], ["a", 3], b"a", {"a": 1}, [None]],
    "stop_token_ids": [3, "3", [-1], [True], [2.0], ["2"]],
    "include_stop_str_in_output": [1, "true", None],
    "ignore_eos": [0, "no", None],
    "seed": [*(v for v in NOT_INTS if v is not None), -2, 1 << 63],
    "logprobs": [*(v for v in NOT_INTS if v is not None and v is not True), -2],
    "prompt_logprobs": [*(v for v in NOT_INTS if v is not None and v is not True), -2],
    "decode_last_prompt_tokens": [*NOT_INTS, -1],
    "trace_steps": [3, "3", [-1], [True], [2.0], ["2"]],
    "timeout_s": [*(v for v in NOT_FLOATS if v is not None), 0, -1.0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD_VALUES.items() for value in values])
def test_a_wrong_value_is_refused_with_its_name_and_what_to_write_instead(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}\b") as raised:
        SamplingParams(**{name: value})
    message = str(raised.value)
    assert "must be" in message or "; " in message


def test_every_parameter_has_wrong_values_that_are_tested() -> None:
    assert set(BAD_VALUES) == set(SamplingParams.__dataclass_fields__)


# ---- requests against an engine


@pytest.mark.parametrize(
    ("prompt", "given", "message"),
    [
        ([], {}, r"prompt_token_ids=\[\]: the prompt is empty; give at least one token"),
        ("text", {}, r"prompt_token_ids='text' must be a list of token ids"),
        ([1, True], {}, r"prompt_token_ids\[1\]=True is bool, not an int"),
        ([np.int64(3)], {}, r"prompt_token_ids\[0\]=.*3.* is int64, not an int; give Python ints \(an array's .tolist\(\)\)"),
        ([1, 2.0], {}, r"prompt_token_ids\[1\]=2.0 is float, not an int"),
        ([VOCAB_SIZE], {}, r"prompt_token_ids\[0\]=331 is outside the vocabulary of 331 tokens; use ids in 0..330"),
        ([5, -1], {}, r"prompt_token_ids\[1\]=-1 is outside"),
        ([1] * 250, {"max_tokens": 7}, r"prompt of 250 tokens \+ max_tokens=7 is over max_model_len=256; use max_tokens <= 6"),
        ([1] * 256, {"max_tokens": 1}, r"over max_model_len=256; shorten the prompt below 256 tokens"),
        ([1] * 256, {"max_tokens": None}, r"over max_model_len=256; shorten the prompt below 256 tokens"),
        ([1] * 250, {"max_tokens": None, "min_tokens": 7}, r"min_tokens=7 is over max_model_len=256; use min_tokens <= 6"),
        (
            [1, 2],
            {"decode_last_prompt_tokens": 2},
            r"decode_last_prompt_tokens=2 must be below the prompt's 2 tokens; use at most 1",
        ),
        ([1], {"n": 9}, r"n=9 is over max_num_seqs=8; lower n or raise max_num_seqs"),
        ([1], {"logprobs": 332}, r"logprobs=332 is over the vocabulary's 331 tokens; use at most 331"),
        ([1], {"prompt_logprobs": 332}, r"prompt_logprobs=332 is over the vocabulary's 331 tokens"),
        ([1], {"stop_token_ids": [331]}, r"stop_token_ids: token id 331 is outside the vocabulary of 331 tokens; use 0..330"),
    ],
)
def test_a_request_that_the_engine_cannot_run_is_refused_with_the_remedy(prompt: Any, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(prompt, SamplingParams(**given))


def test_too_many_or_too_long_stop_strings_are_refused_with_both_numbers() -> None:
    stop = [f"stop {i}" for i in range(64)]
    assert SamplingParams(stop=[*stop, *stop]).stop == stop
    with pytest.raises(ValueError, match="stop holds 65 strings, over the limit of 64; give fewer"):
        SamplingParams(stop=[*stop, "one more"])
    with pytest.raises(ValueError, match="stop holds 10000 strings, over the limit of 64"):
        SamplingParams().updated({"stop": [str(i) for i in range(10_000)]})
    assert SamplingParams(stop="x" * 16_384).stop
    with pytest.raises(ValueError, match="stop holds 16385 characters, over the limit of 16384; give fewer or shorter strings"):
        SamplingParams(stop=["x" * 16_384, "y"])


def test_stop_strings_need_a_tokenizer() -> None:
    check([1], SamplingParams(stop="x"))
    with pytest.raises(ValueError, match=r"stop=\['x'\] needs a tokenizer, which this model does not have; use stop_token_ids"):
        check([1], SamplingParams(stop="x"), has_tokenizer=False)


def test_sampling_params_of_another_library_are_refused() -> None:
    with pytest.raises(ValueError, match="must be a SamplingParams"):
        check([1], {"max_tokens": 3})


def test_a_prompt_that_is_only_scored_may_fill_the_whole_context() -> None:
    check([1] * 256, SamplingParams(prompt_logprobs=-1), score=True)
    with pytest.raises(ValueError, match=r"prompt_token_ids: 257 tokens are over max_model_len=256; shorten the prompt"):
        check([1] * 257, SamplingParams(prompt_logprobs=-1), score=True)


def test_a_request_at_every_limit_is_taken() -> None:
    params = SamplingParams(
        n=8, max_tokens=6, min_tokens=6, logprobs=331, prompt_logprobs=331, stop_token_ids=[330], decode_last_prompt_tokens=249
    )
    check([0, 330] * 125, params)


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.binary(max_size=2),
)
valid_prompts = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=2, max_size=100)
valid_values: dict[str, st.SearchStrategy[Any]] = {
    "n": st.integers(1, MAX_NUM_SEQS),
    "temperature": st.just(0.0) | st.floats(1e-5, 10.0),
    "top_p": st.floats(0.0, 1.0, exclude_min=True),
    "top_k": st.integers(-1, 1000),
    "min_p": st.floats(0.0, 1.0),
    "max_tokens": st.none() | st.integers(16, 100),
    "min_tokens": st.integers(0, 16),
    "stop": st.none() | st.text(min_size=1, max_size=4) | st.lists(st.text(min_size=1, max_size=4), max_size=3),
    "stop_token_ids": st.none() | st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=3),
    "include_stop_str_in_output": st.booleans(),
    "ignore_eos": st.booleans(),
    "seed": st.none() | st.integers(0, (1 << 63) - 1),
    "logprobs": st.none() | st.integers(-1, VOCAB_SIZE),
    "prompt_logprobs": st.none() | st.integers(-1, VOCAB_SIZE),
    "decode_last_prompt_tokens": st.integers(0, 1),
    "trace_steps": st.none(),
    "timeout_s": st.none() | st.floats(1e-3, 1e6),
}
valid_params = st.fixed_dictionaries({}, optional=valid_values)

_integers = st.integers()
_no_ints = ANYTHING.filter(lambda v: isinstance(v, bool) or not isinstance(v, int))
_no_floats = ANYTHING.filter(lambda v: isinstance(v, bool) or not isinstance(v, (int, float)))
_not_finite = st.sampled_from([math.nan, math.inf, -math.inf])


def _not_none(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return values.filter(lambda v: v is not None)


_no_counts = _no_ints.filter(lambda v: v is not None and v is not True)  # True is 1, as in vLLM
wrong_values: dict[str, st.SearchStrategy[Any]] = {
    "n": _no_ints | st.integers(max_value=0) | st.integers(min_value=MAX_NUM_SEQS + 1),
    "temperature": _no_floats | _not_finite | st.floats(max_value=0.0, exclude_max=True) | st.floats(1e-300, 9e-6),
    "top_p": _no_floats | _not_finite | st.floats(max_value=0.0) | st.floats(min_value=1.0, exclude_min=True),
    "top_k": _no_ints | st.integers(max_value=-2),
    "min_p": _no_floats | _not_finite | st.floats(max_value=0.0, exclude_max=True) | st.floats(min_value=1.0, exclude_min=True),
    "max_tokens": _not_none(_no_ints) | st.integers(max_value=0) | st.integers(min_value=MAX_MODEL_LEN),
    "min_tokens": _no_ints | st.integers(max_value=-1) | st.integers(min_value=MAX_MODEL_LEN),
    "stop": st.sampled_from(["", [""], ["a", ""], 0, True, b"x", [b"x"], [None], {"x": 1}]) | st.integers() | st.floats(),
    "stop_token_ids": _integers
    | st.text()
    | st.lists(_no_ints, min_size=1, max_size=3)
    | st.sampled_from([[-1], [VOCAB_SIZE]]),
    "include_stop_str_in_output": ANYTHING.filter(lambda v: not isinstance(v, bool)),
    "ignore_eos": ANYTHING.filter(lambda v: not isinstance(v, bool)),
    "seed": _not_none(_no_ints) | st.integers(max_value=-2) | st.integers(min_value=1 << 63),
    "logprobs": _not_none(_no_ints).filter(lambda v: v is not True)
    | st.integers(max_value=-2)
    | st.integers(min_value=VOCAB_SIZE + 1),
    "prompt_logprobs": _not_none(_no_ints).filter(lambda v: v is not True)
    | st.integers(max_value=-2)
    | st.integers(min_value=VOCAB_SIZE + 1),
    "decode_last_prompt_tokens": _no_ints | st.integers(max_value=-1) | st.integers(min_value=100),
    "trace_steps": _integers | st.text() | st.lists(_no_ints, min_size=1, max_size=3) | st.sampled_from([[-1], [3]]),
    "timeout_s": _not_none(_no_floats) | _not_finite | st.floats(max_value=0.0),
}
wrong_tokens = _no_ints | st.integers(max_value=-1) | st.integers(min_value=VOCAB_SIZE)
wrong_prompts: st.SearchStrategy[Any] = (
    st.just([])
    | ANYTHING.filter(lambda v: not isinstance(v, list))
    | st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=MAX_MODEL_LEN, max_size=MAX_MODEL_LEN + 9)
    | st.tuples(valid_prompts, wrong_tokens, st.integers(0, 100)).map(lambda x: [*x[0][: x[2]], x[1], *x[0][x[2] :]])
)


def changes_nothing(name: str, value: Any, given: dict[str, Any]) -> bool:
    try:
        drop_neutral({name: value}, SAMPLING, {"n": 1, **given})
    except ValueError:
        return False
    return True


@st.composite
def malformed_requests(draw: st.DrawFn) -> tuple[Any, dict[str, Any], str]:
    """A prompt, parameters, and what the error must name: one of them is wrong, the others are in order."""
    prompt, given = draw(valid_prompts), draw(valid_params)
    name = draw(st.sampled_from(["prompt", *sorted(SAMPLING.keys() - HARMLESS), *wrong_values]))
    if name == "prompt":
        return draw(wrong_prompts), given, "prompt"
    if name in SAMPLING:
        return prompt, given | {name: draw(ANYTHING.filter(lambda value: not changes_nothing(name, value, given)))}, name
    if name == "max_tokens":
        given.pop("min_tokens", None)
    return prompt, given | {name: draw(wrong_values[name])}, name


@settings(max_examples=1000, deadline=None)
@given(request=malformed_requests())
def test_every_malformed_request_is_refused_by_the_name_of_what_is_wrong(request: tuple[Any, dict[str, Any], str]) -> None:
    prompt, given, name = request
    named = r"prompt(_token_ids[=\[:]| of \d+ tokens)" if name == "prompt" else rf"{name}[=: ]"
    with pytest.raises(ValueError, match=rf"(^|\+ ){named}") as raised:
        check(prompt, SamplingParams(**given))
    assert len(str(raised.value)) < 1000, "an error should not print a whole prompt"


@settings(max_examples=300, deadline=None)
@given(prompt=valid_prompts, given=valid_params)
def test_every_valid_request_is_taken(prompt: list[int], given: dict[str, Any]) -> None:
    check(prompt, SamplingParams(**given))
