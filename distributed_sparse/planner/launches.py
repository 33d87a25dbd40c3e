"""launches: the kernels of a dense greedy decode step on a GPU, by name, torch's own as "aten".

A sparse layer's are `Policy.launches` more. `tests/test_step_guards.py` holds all of them against the steps themselves, of one
rank: what several ranks send each other is not among them.

These are the numbers that the code takes today. A change that lowers one writes the new one down, as the failing test prints
it; a change that raises one has to be worth it.
"""

from __future__ import annotations

DENSE_ATTENTION = {"_append_kernel": 1, "_attend_kernel": 1, "_combine_kernel": 1}
"""A layer's attention: rotary embedding and append in one; split attend, and what combines its parts."""

LAYER = {"_rms_norm_kernel": 2, "aten": 6}
"""The rest of a layer: norms with the residual, four matrices, silu and its product."""

QK_NORM = {"_rms_norm_kernel": 2}
"""More of a layer whose queries and keys are normalised (Qwen3)."""

STEP = {"_rms_norm_kernel": 1, "aten": 21}
"""A step outside its layers: new pages, its inputs, the embedding, the last norm, logits, and the most likely tokens."""


def dense_launches(num_layers: int, qk_norm: bool) -> int:
    """Kernels of a step whose layers are all dense."""
    of_layer = sum(DENSE_ATTENTION.values()) + sum(LAYER.values()) + qk_norm * sum(QK_NORM.values())
    return num_layers * of_layer + sum(STEP.values())
