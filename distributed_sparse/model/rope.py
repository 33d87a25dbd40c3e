"""rope: cosines and sines of the rotary position embedding, for every rope type of these families in transformers."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distributed_sparse.utils.validation import check_bool, check_float, shown

_ORIGINAL = "original_max_position_embeddings"
_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (_ORIGINAL,),
    "longrope": (_ORIGINAL, "short_factor", "long_factor"),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
}
"""Rope type -> required parameters, in addition to rope_theta."""
_OPTIONAL: dict[str, tuple[str, ...]] = {
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "attention_factor"),
}
_MAY_BE_ZERO = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
ROPE_TYPES = tuple(_REQUIRED)


@dataclass(frozen=True)
class RopeConfig:
    """A checkpoint's rotary embedding."""

    head_dim: int
    max_position_embeddings: int
    parameters: dict[str, Any]
    """transformers' ``rope_parameters``: rope_type, rope_theta, and the parameters of that type. Standardised and checked."""

    @classmethod
    def from_config(cls, raw: Mapping[str, Any], head_dim: int, max_position_embeddings: int) -> RopeConfig:
        """Read the rotary parameters of a config.json.

        Keys: rope_parameters, or the older rope_scaling, rope_theta, partial_rotary_factor and
        original_max_position_embeddings. transformers' own functions decide which of them takes precedence.

        Raises:
            ValueError: unknown rope type, parameters per layer type, partial rotary embedding, odd head_dim, a value that is
                not a number, factors of the wrong length; names the key and the value.
        """
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} is odd; the rotary embedding rotates pairs of channels")
        for key in ("rope_scaling", "rope_parameters"):
            if not isinstance(raw.get(key), dict | None):
                raise ValueError(
                    f"{key}={shown(raw[key])} must be an object such as {{'rope_type': 'yarn', 'factor': 4.0, ...}}"
                )
        given = _transformers_config(raw, head_dim, max_position_embeddings).rope_parameters
        if nested := [key for key, value in given.items() if isinstance(value, dict)]:
            raise ValueError(
                f"rope_parameters per layer type ({', '.join(nested)}) are not supported; one set for all layers is"
            )
        rope_type, partial = given["rope_type"], given.get("partial_rotary_factor")
        if not isinstance(rope_type, str) or rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type={shown(rope_type)} is not supported; supported are {', '.join(ROPE_TYPES)}")
        if partial is not None and partial != 1.0:
            raise ValueError(f"partial_rotary_factor={shown(partial)} is not supported; only 1.0 is: every channel is rotated")
        parameters: dict[str, Any] = {"rope_type": rope_type}
        for name in ("rope_theta", *_REQUIRED[rope_type]):
            parameters[name] = _checked(name, given.get(name), head_dim)
        for name in _OPTIONAL.get(rope_type, ()):
            if name in given:  # null differs from absent: truncate=null does not truncate
                parameters[name] = None if given[name] is None else _checked(name, given[name], head_dim)
        config = cls(head_dim, max_position_embeddings, parameters)
        try:
            cos, _ = Rope(config).cos_sin(torch.ones(2), torch.tensor([1, max_position_embeddings]))
        except (ArithmeticError, KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"the rotary embedding of {parameters} cannot be computed: {error!r}") from error
        if not cos.isfinite().all():
            raise ValueError(f"the rotary embedding of {parameters}, head_dim={head_dim} is not finite; correct these values")
        return config

    @property
    def rope_type(self) -> str:
        return self.parameters["rope_type"]

    @property
    def rope_theta(self) -> float:
        return self.parameters["rope_theta"]

    @property
    def factor(self) -> float | None:
        return self.parameters.get("factor")

    @property
    def original_max_position_embeddings(self) -> float | None:
        """Tokens; None for a rope type that does not use it."""
        return self.parameters.get(_ORIGINAL)


def _checked(name: str, value: Any, head_dim: int) -> Any:
    if name == "truncate":
        return check_bool(name, value)
    if name not in ("short_factor", "long_factor"):
        low_excluded = name not in _MAY_BE_ZERO
        return check_float(name, value, 0.0, low_excluded=low_excluded, remedy="give the value that the model was trained with")
    if not isinstance(value, list):
        raise ValueError(f"{name}={shown(value)} must be a list of {head_dim // 2} numbers")
    if len(value) != head_dim // 2:
        raise ValueError(f"{name} has {len(value)} entries; head_dim={head_dim} needs {head_dim // 2}")
    return [check_float(name, factor, 0.0, low_excluded=True, remedy="every entry is a positive number") for factor in value]


def _transformers_config(raw: Mapping[str, Any], head_dim: int, max_position_embeddings: int) -> Any:
    """A config object for transformers' rope functions, filled in the order of ``PreTrainedConfig.__post_init__``.

    Uses only transformers' mixin: a family's config class takes seconds to import, and its error messages name no key.
    """
    from transformers.modeling_rope_utils import RotaryEmbeddingConfigMixin

    config: Any = RotaryEmbeddingConfigMixin()
    config.head_dim = config.hidden_size = head_dim
    config.num_attention_heads = 1
    config.max_position_embeddings = max_position_embeddings
    raw = deepcopy(dict(raw))  # transformers writes defaults into the given objects
    config.rope_parameters = raw.get("rope_parameters")
    older = ("rope_scaling", "rope_theta", "partial_rotary_factor")
    config.convert_rope_params_to_dict(**{key: raw[key] for key in older if key in raw})
    if _ORIGINAL in raw:
        config.original_max_position_embeddings = raw[_ORIGINAL]
    config.standardize_rope_params()
    return config


class Rope:
    """The rotary angles of one model. Owns the inverse frequencies, float32 [d/2], on the device."""

    def __init__(self, config: RopeConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        self._exponents = half.to(device)
        self.attention_factor = 1.0
        """Scale of cos and sin (yarn, longrope); logits scale by its square."""
        if config.rope_type == "default":
            inv_freq = 1.0 / config.rope_theta**half
        else:
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            source = _transformers_config(
                {"rope_parameters": config.parameters}, config.head_dim, config.max_position_embeddings
            )
            init: Any = ROPE_INIT_FUNCTIONS[config.rope_type]
            inv_freq, self.attention_factor = init(source, None)
        self.inv_freq = inv_freq.to(device)
        """float32 [d/2], radians per position, for lengths up to the original context."""
        self._long_inv_freq: Tensor | None = None
        if config.rope_type == "longrope":
            past = config.parameters[_ORIGINAL] + 1
            self._long_inv_freq = init(source, None, seq_len=past)[0].to(device)

    @property
    def uses_lengths(self) -> bool:
        """Whether `cos_sin` depends on `rope_lengths`."""
        return self.config.rope_type in ("dynamic", "longrope")

    def cos_sin(self, positions: Tensor, rope_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of each token's angles, multiplied by the attention factor. Does not synchronise.

        Args:
            positions: int64 [N], 0 for a sequence's first token.
            rope_lengths: int64 [N], the length that determines the frequencies of ``dynamic`` and ``longrope``: for each token,
                max(length of its sequence's prefill, its position + 1). The result is then independent of the chunks, and a
                prompt prefilled at once and then decoded equals transformers. Other types ignore it.

        Returns:
            (cos, sin), float32 [N, d/2].
        """
        angles = positions.float()[:, None] * self._inv_freq_at(rope_lengths)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def _inv_freq_at(self, rope_lengths: Tensor) -> Tensor:
        """float32 [d/2], or [N, d/2] if the frequencies depend on the length."""
        config = self.config
        if config.rope_type == "longrope":
            assert self._long_inv_freq is not None and config.original_max_position_embeddings is not None
            is_long = rope_lengths > config.original_max_position_embeddings
            return torch.where(is_long[:, None], self._long_inv_freq, self.inv_freq)
        if config.rope_type == "dynamic":
            # The base grows with the length (NTK-aware scaling), as in transformers' _compute_dynamic_ntk_parameters.
            assert config.factor is not None
            factor, longest, d = config.factor, config.max_position_embeddings, config.head_dim
            stretch = factor * rope_lengths.clamp(min=longest) / longest - (factor - 1)
            base = config.rope_theta * stretch ** (d / (d - 2))
            return 1.0 / base[:, None] ** self._exponents
        return self.inv_freq
