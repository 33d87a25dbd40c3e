"""launches: the kernels that a greedy decode step launches on a GPU, by name; torch's own are "aten".

`tests/test_step_guards.py` compares these counts with real steps of one rank, so communication between ranks is not included.
They are the counts of today's code. If a change lowers one, write the new count here, as the failing test prints it; a change
that raises one needs a reason.
"""

from __future__ import annotations

from collections import Counter

from distributed_sparse.selection.base import Policy

DENSE_ATTENTION = {"_append_kernel": 1, "_attend_kernel": 1, "_combine_kernel": 1}
"""A layer's attention: fused rotary embedding and append, split attend, and the combination of its parts."""

LAYER = {"_rms_norm_kernel": 2, "aten": 6}
"""The rest of a layer: norms with the residual, four matrices, silu and its product."""

QK_NORM = {"_rms_norm_kernel": 2}
"""Additional kernels of a layer that normalises queries and keys (Qwen3)."""

STEP = {"_rms_norm_kernel": 1, "aten": 21}
"""A step outside its layers: new pages, inputs, embedding, last norm, logits, and the most likely tokens."""


def dense_launches(num_layers: int, qk_norm: bool) -> int:
    """Kernels of a step whose layers are all dense."""
    of_layer = sum(DENSE_ATTENTION.values()) + sum(LAYER.values()) + qk_norm * sum(QK_NORM.values())
    return num_layers * of_layer + sum(STEP.values())


_COUNTED = {"_count_attended_kernel": 1}
_QUEST = {"_page_scores_kernel": 1, "_top_k_pages_kernel": 1}

METHOD_LAYER: dict[str, dict[str, int]] = {
    "dense": {},
    "quest": _QUEST | _COUNTED,
    "twilight": {
        **{"_int4_logits_kernel": 1, "_top_p_threshold_kernel": 1, "_top_p_list_kernel": 1, "_whole_rows_kernel": 1},
        **_COUNTED,
    },
    "vattention": {
        **{"_attend_kernel": 1, "_combine_kernel": 1, "_plan_pilot_kernel": 1, "_sample_residual_kernel": 2},
        **{"_residual_statistics_kernel": 1, "_plan_samples_kernel": 1, "aten": 3},
        **_QUEST,
        **_COUNTED,
    },
    "hash": {
        **{"_append_signatures_kernel": 1, "_pack_signs_kernel": 1, "_hamming_scores_kernel": 1, "_top_k_pages_kernel": 1},
        **{"_whole_rows_kernel": 1, "aten": 22},
        **_COUNTED,
    },
    "random": {"_top_k_pages_kernel": 1, "aten": 169} | _COUNTED,
}
"""Kernels of a sparse layer in addition to a dense layer's. Other methods are planned with the kernel that counts attended
tokens only; Twilight and vAttention with Quest as their selector."""

METHOD_STEP = {"quest": 1, "twilight": 6, "vattention": 6, "hash": 2, "window": 10, "random": 1}
"""torch launches of the first sparse layer of a step, made for all layers of equal settings."""


def layer_launches(policy: Policy) -> Counter[str]:
    """Kernels of a layer with this policy in addition to a dense layer's."""
    method = policy.config_class.method
    own = Counter(METHOD_LAYER.get(method, _COUNTED))
    return own + Counter(_QUEST) if method == "twilight" and policy.config.selector != "full" else own  # type: ignore[attr-defined]


def step_launches(policy: Policy) -> Counter[str]:
    """Kernels that the first sparse layer of a step launches for all layers of equal settings."""
    method = policy.config_class.method
    has_no_selector = method == "twilight" and policy.config.selector == "full"  # type: ignore[attr-defined]
    return Counter(aten=0 if has_no_selector else METHOD_STEP.get(method, 0))
