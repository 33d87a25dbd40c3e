"""rope: cosines and sines of the rotary position embedding, for every rope type that transformers gives these families."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """A checkpoint's rotary parameters, under transformers' names. What a rope type does not use is None."""

    rope_type: str
    rope_theta: float
    head_dim: int
    max_position_embeddings: int
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None

    @classmethod
    def from_parameters(cls, parameters: dict[str, Any], head_dim: int, max_position_embeddings: int) -> RopeConfig:
        """From the ``rope_parameters`` of a transformers config, which it has already brought to its new form.

        Raises:
            ValueError: a rope type that is unknown, parameters per layer type, a partial rotary embedding, an odd head_dim, or
                factors of the wrong length.
        """
        rope_type = parameters.get("rope_type")
        if rope_type is None and any(isinstance(value, dict) for value in parameters.values()):
            raise ValueError(
                f"rope_parameters per layer type ({', '.join(parameters)}) are not supported; one set for all layers is"
            )
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_type={rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
        partial = parameters.get("partial_rotary_factor")
        if partial is not None and partial != 1.0:
            raise ValueError(f"partial_rotary_factor={partial} is not supported; only 1.0 is: every channel is rotated")
        if head_dim % 2:
            raise ValueError(f"head_dim={head_dim} is odd; the rotary embedding turns channels in pairs")
        values: dict[str, Any] = {name: parameters[name] for name in cls._scaling_names() if parameters.get(name) is not None}
        for name in ("short_factor", "long_factor"):
            if name in values:
                values[name] = tuple(float(factor) for factor in values[name])
                if len(values[name]) != head_dim // 2:
                    raise ValueError(f"{name} has {len(values[name])} entries; head_dim={head_dim} needs {head_dim // 2}")
        if rope_type == "yarn" and "factor" not in values:
            values["factor"] = max_position_embeddings / values["original_max_position_embeddings"]
        return cls(rope_type, float(parameters["rope_theta"]), head_dim, max_position_embeddings, **values)

    @classmethod
    def _scaling_names(cls) -> list[str]:
        shape = ("rope_type", "rope_theta", "head_dim", "max_position_embeddings")
        return [name for name in cls.__dataclass_fields__ if name not in shape]

    def to_transformers(self) -> LlamaConfig:
        """A config of one head with these parameters: all that transformers' rope functions look at."""
        parameters = {name: value for name in self._scaling_names() if (value := asdict(self)[name]) is not None}
        for name in ("short_factor", "long_factor"):
            if name in parameters:
                parameters[name] = list(parameters[name])
        return LlamaConfig(
            hidden_size=self.head_dim,
            num_attention_heads=1,
            head_dim=self.head_dim,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters={"rope_type": self.rope_type, "rope_theta": self.rope_theta, **parameters},
        )


class Rope:
    """The rotary angles of one model. Owns the inverse frequencies, float32 [d/2], on its device."""

    def __init__(self, config: RopeConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        half = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        self._exponents = half.to(device)
        self.attention_factor = 1.0
        """Scale of cos and sin (yarn, longrope), so that logits scale by its square."""
        if config.rope_type == "default":
            inv_freq = 1.0 / config.rope_theta**half
        else:
            init = ROPE_INIT_FUNCTIONS[config.rope_type]
            inv_freq, self.attention_factor = init(config.to_transformers(), None)
        self.inv_freq = inv_freq.to(device)
        """float32 [d/2], radians per position, at lengths that need no change of it."""
        self._long_inv_freq: Tensor | None = None
        if config.rope_type == "longrope":
            assert config.original_max_position_embeddings is not None
            past = config.original_max_position_embeddings + 1
            self._long_inv_freq = init(config.to_transformers(), None, seq_len=past)[0].to(device)

    @property
    def uses_lengths(self) -> bool:
        """Whether `cos_sin` depends on `rope_lengths`."""
        return self.config.rope_type in ("dynamic", "longrope")

    def cos_sin(self, positions: Tensor, rope_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of each token's angles, the attention factor folded in. No host synchronisation.

        Args:
            positions: int64 [N], 0 for a sequence's first token.
            rope_lengths: int64 [N], the length that ``dynamic`` and ``longrope`` take their frequencies from: for a token of a
                sequence, max(length of its prefill, its position + 1). Then the cut into chunks changes nothing, and a prompt
                prefilled at once and then decoded equals transformers. Other types do not look at it.

        Returns:
            (cos, sin), float32 [N, d/2].
        """
        angles = positions.float()[:, None] * self._inv_freq_at(rope_lengths)
        return angles.cos() * self.attention_factor, angles.sin() * self.attention_factor

    def _inv_freq_at(self, rope_lengths: Tensor) -> Tensor:
        """float32 [d/2], or [N, d/2] where the frequencies depend on the length."""
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
