"""transformers as the truth: logits and greedy tokens of one sequence, densely or with a sparse method emulated beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

TOLERANCE = 1e-4
"""Largest error of a logit in units of the logits' spread: float32 sums in another order, and no more."""


@torch.no_grad()
def reference_logits(model: PreTrainedModel, token_ids: list[int], decoded: int = 0, **attention: Any) -> Tensor:
    """float32 [n, V]: the last ``decoded`` tokens one by one with the cache, all before them at once.

    Args:
        attention: what the model's attention function takes, e.g. ``emulation``.
    """
    cache = DynamicCache(config=model.config)
    start = len(token_ids) - decoded
    chunks = [token_ids[:start], *([token] for token in token_ids[start:])]
    logits = [model(torch.tensor([chunk]), past_key_values=cache, **attention).logits[0] for chunk in chunks]
    return torch.cat(logits).float()


@torch.no_grad()
def greedy_tokens(model: PreTrainedModel, prompt: list[int], max_tokens: int) -> list[int]:
    """What ``generate`` answers, without the prompt; its end-of-sequence token included."""
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": max_tokens, "pad_token_id": 0}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)  # type: ignore[operator]
    return out[0, len(prompt) :].tolist()


def assert_close_to(found: np.ndarray | None, logits: Tensor, tolerance: float = TOLERANCE) -> None:
    """Log-probabilities [n - 1, V] of an engine against the logits [n, V] of a reference, whose last row predicts nothing."""
    assert found is not None and found.shape == (len(logits) - 1, logits.shape[1])
    expected = logits[:-1].double().log_softmax(-1)
    error = (torch.from_numpy(found).double() - expected).abs().max()
    assert error <= tolerance * logits.std(), f"error {error:.2e} at a spread of {logits.std():.2f}"


@dataclass
class PageMethod:
    """Quest or the window on the keys of a transformers model, in float64: what one decoded token may see.

    Pages follow from positions, their bounds from the keys: nothing of the engine is used.
    """

    method: str
    token_budget: int
    page_size: int = 16
    dense_layers: int = 2
    sink_pages: int = 1
    recent_pages: int = 2
    min_context: int = 0
    group_reduction: str = "max"

    def visible(self, layer: int, query: Tensor, key: Tensor) -> Tensor:
        """query [H_q, d], key [H_kv, n, d] -> bool [H_kv, n]: the tokens of each KV head's list."""
        kv_heads, length, _ = key.shape
        keep = torch.zeros(kv_heads, length, dtype=torch.bool)
        num_pages = -(-length // self.page_size)
        budget = -(-self.token_budget // self.page_size)
        if layer < self.dense_layers or length < self.min_context or num_pages <= budget:
            return ~keep
        forced = {*range(self.sink_pages), *range(num_pages - self.recent_pages, num_pages)}
        for head in range(kv_heads):
            for page in [*forced, *self._best(query, key, head, sorted(set(range(num_pages)) - forced), budget - len(forced))]:
                keep[head, page * self.page_size : (page + 1) * self.page_size] = True
        return keep

    def _best(self, query: Tensor, key: Tensor, head: int, pages: list[int], count: int) -> list[int]:
        """The ``count`` best of the pages that are not forced; ties: the lower one."""
        if self.method == "window":
            return pages[len(pages) - count :]
        group = query.shape[0] // key.shape[0]
        queries = query[head * group : (head + 1) * group].double()  # [G, d]
        scores = {}
        for page in pages:
            keys = key[head, page * self.page_size : (page + 1) * self.page_size].double()
            bounds = torch.maximum(queries * keys.amin(0), queries * keys.amax(0)).sum(-1)  # [G]
            scores[page] = float(bounds.max() if self.group_reduction == "max" else bounds.sum())
        return sorted(pages, key=lambda page: (-scores[page], page))[:count]


class Emulation(Protocol):
    """A sparse method beside a transformers model: what one decoded token attends, from the keys alone.

    A method that weighs tokens has `log_weights(layer, query, key, value) -> float64 [H_q, n]` instead: 0 for a token that is
    seen, -inf for one that is not, log(n_s / b) for one that stands for others.
    """

    def visible(self, layer: int, query: Tensor, key: Tensor) -> Tensor:
        """query [H_q, d], key [H_kv, n, d] -> bool [H_kv, n]: the tokens that each KV head reads."""
        ...


def log_weights(emulation: Any, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """float64 [H_q, n]: what is added to the logits of each query head. query [H_q, d], key and value [H_kv, n, d]."""
    weigh = getattr(emulation, "log_weights", None)
    if weigh is not None:
        return weigh(layer, query, key, value)
    visible = emulation.visible(layer, query, key).repeat_interleave(len(query) // len(key), 0)
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, float("-inf"))


def page_method_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    """An attention function of transformers: causal, and what ``emulation`` lets a decoded token attend. Batch 1.

    query [1, H_q, m, d], key and value [1, H_kv, n, d] -> ([1, m, H_q, d], None). ``emulation`` is an `Emulation`, or weighs.
    """
    emulation = kwargs.get("emulation")
    m, n, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    logits = query[0] @ key[0].repeat_interleave(group, 0).transpose(1, 2) * module.scaling
    if emulation is not None and m == 1:
        logits = logits + log_weights(emulation, module.layer_idx, query[0, :, 0], key[0], value[0])[:, None].to(logits.dtype)
    else:
        logits = logits.masked_fill(torch.arange(n) > torch.arange(n - m, n)[:, None], float("-inf"))
    return (logits.softmax(-1) @ value[0].repeat_interleave(group, 0)).transpose(0, 1)[None], None


AttentionInterface.register("page_method", page_method_attention)


@torch.no_grad()
def greedy_tokens_of_method(model: PreTrainedModel, prompt: list[int], max_tokens: int, emulation: Any) -> list[int]:
    """Greedy decoding of a model whose attention is ``page_method``: dense prefill, then the method for every further token."""
    cache, new, tokens = DynamicCache(config=model.config), prompt, []
    for _ in range(max_tokens):
        logits = model(torch.tensor([new]), past_key_values=cache, emulation=emulation).logits[0, -1]
        new = [int(logits.argmax())]
        tokens += new
    return tokens
