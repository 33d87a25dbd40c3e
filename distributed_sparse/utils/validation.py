"""validation: checks shared by all configurations. Each raises a ValueError that names the key, its value and the remedy."""

import difflib
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import Any


def shown(value: Any, limit: int = 60) -> str:
    """Return `repr(value)`, cut to `limit` characters, which keeps error messages with long prompts short."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def nearest_key(key: str, valid: Iterable[str]) -> str | None:
    """Return the valid key most similar to `key`, or None if none is similar."""
    return next(iter(difflib.get_close_matches(key, list(valid), n=1, cutoff=0.6)), None)


def check_keys(given: Iterable[Any], valid: Iterable[str], where: str) -> None:
    """Raise ValueError for the first key of `given` that is not in `valid`.

    Args:
        given: keys from the user; a mapping is accepted.
        valid: the valid keys.
        where: origin of the keys for the error message, such as "sparse" or "configs/demo.yaml".

    Raises:
        ValueError: a key is unknown; the message names it, the nearest valid key and all valid keys.
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
    """Return `value` if it is a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={shown(value)} must be true or false")
    return value


def check_string(name: str, value: Any, remedy: str) -> str:
    """Return `value` if it is a non-empty string."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name}={shown(value)} must be a non-empty string; {remedy}")
    return value


def check_text(name: str, value: Any, remedy: str) -> str:
    """Return `value` if it is a non-empty string without lone surrogates, which cannot be encoded as UTF-8."""
    text = check_string(name, value, remedy)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}={shown(value)} holds a lone surrogate, which is not a character; {remedy}") from None
    return text


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return `value` if it is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={shown(value)} is not known; use one of {', '.join(map(repr, choices))}")
    return value


_DTYPES = {"float": "float32", "fp32": "float32", "half": "float16", "fp16": "float16", "bf16": "bfloat16"}


def check_dtype(name: str, value: Any) -> str:
    """Return "auto", "float32", "float16" or "bfloat16"; accepts torch.float32, "torch.float32", "half", "bf16", ... too."""
    text = value if isinstance(value, str) else str(value) if type(value).__module__ == "torch" else ""
    text = text.lower().removeprefix("torch.")
    dtype = _DTYPES.get(text, text)
    if dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise ValueError(f"{name}={shown(value)} is not known; use one of 'auto', 'float32', 'float16', 'bfloat16'")
    return dtype


def check_int(name: str, value: Any, low: int, high: int | None = None, *, remedy: str) -> int:
    """Return `value` as an int in `low..high` (inclusive; `high` None: no limit). Rejects bools and floats."""
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
    """Return `value` as a finite float from `low` to `high` (`high` inclusive; None: no limit). Rejects bools."""
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
