"""The checks that every configuration shares: each raises a ValueError that names the key, its value and the remedy."""

import difflib
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any


def shown(value: Any, limit: int = 60) -> str:
    """`repr(value)`, cut to `limit` characters, so that a long prompt never fills an error message."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def nearest_key(key: str, valid: Iterable[str]) -> str | None:
    """The valid key that `key` was probably meant to be, or None when nothing is near."""
    return next(iter(difflib.get_close_matches(key, list(valid), n=1, cutoff=0.6)), None)


def check_keys(given: Iterable[Any], valid: Iterable[str], where: str) -> None:
    """Refuse the first key of `given` that is not in `valid`.

    Args:
        given: the keys that a user wrote (a mapping works as it is).
        valid: the keys that `where` knows.
        where: the place in the user's words, such as "sparse" or "configs/demo.yaml".

    Raises:
        ValueError: names the unknown key, the nearest valid key and all valid keys.
    """
    valid = list(valid)
    for key in given:
        if not isinstance(key, str):
            raise ValueError(f"{where}: key {shown(key)} is not a string; valid keys: {', '.join(valid)}")
        if key not in valid:
            near = nearest_key(key, valid)
            hint = f"did you mean {near!r}? " if near else ""
            raise ValueError(f"{where}: unknown key {key!r}; {hint}valid keys: {', '.join(valid)}")


def check_bool(name: str, value: Any) -> bool:
    """`value` when it is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be true or false")
    return value


def check_string(name: str, value: Any, remedy: str) -> str:
    """`value` when it is a string that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}={shown(value)} must be a non-empty string; {remedy}")
    return value


def check_text(name: str, value: Any, remedy: str) -> str:
    """`value` when it is a string that is not empty, and Unicode text: without lone surrogates, which nothing can encode."""
    text = check_string(name, value, remedy)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}={shown(value)} holds a lone surrogate, which is no character; {remedy}") from None
    return text


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value` when it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={shown(value)} is not known; use one of {', '.join(map(repr, choices))}")
    return value


_DTYPES = {"float": "float32", "fp32": "float32", "half": "float16", "fp16": "float16", "bf16": "bfloat16"}


def check_dtype(name: str, value: Any) -> str:
    """ "auto", "float32", "float16" or "bfloat16", also for its other names: torch.float32, "torch.float32", "half", "bf16"."""
    text = value if isinstance(value, str) else str(value) if type(value).__module__ == "torch" else ""
    text = text.lower().removeprefix("torch.")
    dtype = _DTYPES.get(text, text)
    if dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise ValueError(f"{name}={shown(value)} is not known; use one of 'auto', 'float32', 'float16', 'bfloat16'")
    return dtype


def check_int(name: str, value: Any, low: int, high: int | None = None, *, remedy: str) -> int:
    """`value` as an int in `low..high` (both included, `high` None: no limit); bools and floats are refused."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}={shown(value)} must be an integer, not {type(value).__name__}; {remedy}")
    number = int(value)
    if number < low or (high is not None and number > high):
        limits = f">= {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name}={shown(value)} must be {limits}; {remedy}")
    return number


def check_float(
    name: str, value: Any, low: float, high: float | None = None, *, low_excluded: bool = False, remedy: str
) -> float:
    """`value` as a finite float between `low` and `high` (`high` included, None: no limit); bools are refused."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={shown(value)} must be a number, not {type(value).__name__}; {remedy}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    too_low = number <= low if low_excluded else number < low
    if not math.isfinite(number) or too_low or (high is not None and number > high):
        limits = f"{'>' if low_excluded else '>='} {low:g}" + ("" if high is None else f" and <= {high:g}")
        raise ValueError(f"{name}={shown(value)} must be finite, {limits}; {remedy}")
    return number
