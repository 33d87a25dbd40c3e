"""What SparseAttention counts, on the device and on the host: a captured step runs the one, and the shard calls the other."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_sparse.cache import LayerCache
from distributed_sparse.selection.base import DecodeBatch, Policy, Selection, attend_partially, dense_selection
from distributed_sparse.selection.dense import DenseConfig, DensePolicy
from distributed_sparse.selection.quest import QuestConfig, QuestPolicy
from distributed_sparse.shard.attention import SparseAttention
from tests.support.decode_rows import DecodeRows, decode_rows

CONTEXTS = [100, 40, 170, 7]
BUDGET, PAGE = 48, 16
KV_HEADS, DIM = 4, 64


def padded(rows: DecodeRows, count: int) -> DecodeRows:
    """The same rows with `count` more that pad the batch: no context, no page, and any bits in the page table."""

    def pad(x: Tensor, value: int = 0, dim: int = 0) -> Tensor:
        shape = list(x.shape)
        shape[dim] = count
        return torch.cat([x, torch.full(shape, value, dtype=x.dtype)], dim=dim)

    batch = rows.batch
    some: dict[str, Any] = {
        name: pad(getattr(batch, name)) for name in ("num_pages", "context_lens", "last_page_len", "page_table")
    }
    return replace(rows, q=pad(rows.q), batch=replace(batch, **some, random_key=pad(batch.random_key, dim=1)))


def counted(rows: DecodeRows, policies: list[Policy], steps: int = 1) -> SparseAttention:
    """An attention whose decode rows have run through every layer, and that has accounted for the real ones."""
    attention = SparseAttention(rows.geometry, policies, SimpleNamespace(layers=[rows.cache] * len(policies)))  # type: ignore[arg-type]
    step: Any = SimpleNamespace(decode=rows.batch)
    for _ in range(steps):
        attention.begin(step)
        for layer in range(len(policies)):
            attention._decode(layer, rows.q, rows.cache)
        attention.account(CONTEXTS, max(CONTEXTS), attention.dense_layers)
    return attention


def quest(rows: DecodeRows) -> Policy:
    return rows.policy(QuestPolicy, QuestConfig(token_budget=BUDGET))


def attended_by_quest(n: int) -> int:
    kept = -(-n // PAGE) - BUDGET // PAGE
    return n if kept <= 0 else n - kept * PAGE


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("steps", [1, 2])
def test_rows_that_pad_a_batch_count_in_no_number_of_a_report(padding: int, steps: int) -> None:
    rows = decode_rows(CONTEXTS, kv_heads=KV_HEADS, head_dim=DIM)
    policies = [rows.policy(DensePolicy, DenseConfig()), quest(rows)]
    attention = counted(padded(rows, padding), policies, steps)
    sparse = sum(attended_by_quest(n) for n in CONTEXTS)
    assert attention.tokens_attended == [[steps * sum(CONTEXTS)] * KV_HEADS, [steps * sparse] * KV_HEADS]
    assert attention.tokens_in_context == steps * sum(CONTEXTS)
    num_sparse = steps * KV_HEADS * sum(attended_by_quest(n) < n for n in CONTEXTS)
    assert attention.rows == (2 * steps * KV_HEADS * len(CONTEXTS) - num_sparse, num_sparse)
    scored = steps * policies[1].bytes_scored(CONTEXTS)
    assert scored > 0
    token_bytes = 2 * DIM * torch.float32.itemsize
    assert attention.bytes_read == steps * KV_HEADS * (sum(CONTEXTS) + sparse) * token_bytes + scored


def test_the_host_counts_a_replayed_step_from_what_its_capture_noted() -> None:
    """A graph runs no line of Python: `account` alone tells of its rows, and of layers that the device does not count."""
    rows = decode_rows(CONTEXTS, kv_heads=KV_HEADS, head_dim=DIM)
    policies = [rows.policy(DensePolicy, DenseConfig()), quest(rows)]
    attention = counted(rows, policies)
    assert attention.dense_layers == [0]
    before, scored = attention.tokens_attended, attention._scored_bytes
    attention.account([10, 20], 512, [0])
    assert attention.tokens_attended == [[tokens + 30 for tokens in before[0]], before[1]]
    assert attention.tokens_in_context == sum(CONTEXTS) + 30
    assert attention._scored_bytes - scored == policies[1].bytes_scored([10, 20])
    attention.account([], 512, [])
    assert attention.tokens_in_context == sum(CONTEXTS) + 30


class Nested(Policy):
    """A method from outside whose partial result has a partial result of its own, and that reads some tokens apart."""

    def select(self, q: Tensor, cache: LayerCache, batch: DecodeBatch) -> Selection:
        heads, scale = self.geometry.num_kv_heads, self.geometry.scale
        whole = dense_selection(batch, heads)
        nothing = torch.zeros_like(whole.num_pages)
        token = batch.page_table[:, None, :1].expand(-1, heads, -1) * batch.page_size
        one = (batch.context_lens > 0).int()[:, None].expand(-1, heads)
        first = Selection(whole.pages, nothing, token, one)
        second = Selection(whole.pages, nothing, token + 1, one, partial_selection=first)
        second.partial = attend_partially(q, cache, batch, first, scale)
        third = Selection(whole.pages, nothing, token + 2, one, partial_selection=second, extra_tokens_read=2 * one)
        third.partial = attend_partially(q, cache, batch, second, scale)
        return third


def test_a_partial_result_of_a_partial_result_is_counted_too() -> None:
    rows = decode_rows(CONTEXTS, kv_heads=KV_HEADS, head_dim=DIM)
    attention = counted(padded(rows, 1), [Nested(DenseConfig(), rows.geometry)])
    assert attention.tokens_attended == [[3 * len(CONTEXTS)] * KV_HEADS]
    assert attention.rows == (0, KV_HEADS * len(CONTEXTS))
    assert attention.bytes_read == KV_HEADS * len(CONTEXTS) * (3 + 2) * 2 * DIM * torch.float32.itemsize
