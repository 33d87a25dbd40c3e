"""StepBatch: a StepPlan as the tensors that one forward pass needs. Decode rows come first, then the prompt chunks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed_sparse.driver.messages import StepPlan
from distributed_sparse.selection.base import DecodeBatch
from distributed_sparse.selection.metadata import AppendRuns
from distributed_sparse.shard.slots import SlotTable


@dataclass(frozen=True)
class PrefillBatch:
    """The prompt chunks of a step: see `kernels/prefill_attend.py`."""

    page_table: Tensor
    query_start: Tensor
    context_lens: Tensor
    max_query_len: int


@dataclass(frozen=True)
class StepBatch:
    """token_ids, positions, rope_lengths: int64 [N]; N = decode rows + prompt tokens."""

    token_ids: Tensor
    positions: Tensor
    rope_lengths: Tensor
    runs: AppendRuns
    num_decode: int
    decode: DecodeBatch | None
    prefill: PrefillBatch | None
    context_lens: list[int]
    """Of the decode rows, known on the host."""


def build_batch(plan: StepPlan, slots: SlotTable, page_size: int) -> StepBatch:
    """Lay out a plan's tokens; the slots have taken in its new pages already."""
    device = slots.device
    decode_slots = np.array([row.slot for row in plan.decode], dtype=np.int64)
    decode_positions = np.array([row.position for row in plan.decode], dtype=np.int64)
    tokens = [row.token if row.token is not None else 0 for row in plan.decode]
    positions = [decode_positions]
    prefill_lengths = [np.array([slots.setup(row.slot).prefill_length for row in plan.decode], dtype=np.int64)]
    runs = _Runs()
    runs.add(
        slots.host_page_table[decode_slots, decode_positions // page_size],
        np.arange(len(plan.decode)),
        decode_positions % page_size,
        np.ones(len(plan.decode), dtype=np.int64),
    )
    for chunk in plan.prefill:
        length = len(chunk.tokens)
        positions.append(np.arange(chunk.start, chunk.start + length))
        prefill_lengths.append(np.full(length, slots.setup(chunk.slot).prefill_length))
        borders = np.unique(
            np.r_[chunk.start, np.arange(-(-chunk.start // page_size), -(-(chunk.start + length) // page_size)) * page_size]
        )
        ends = np.r_[borders[1:], chunk.start + length]
        pages = slots.host_page_table[chunk.slot, borders // page_size]
        runs.add(pages, len(tokens) + borders - chunk.start, borders % page_size, ends - borders)
        tokens += chunk.tokens
    all_positions = np.concatenate(positions)
    ints = np.stack(
        [np.array(tokens, dtype=np.int64), all_positions, np.maximum(all_positions + 1, np.concatenate(prefill_lengths))]
    )
    token_ids, device_positions, rope_lengths = torch.from_numpy(ints).to(device, non_blocking=True).unbind(0)
    token_ids = _with_device_tokens(token_ids, plan, slots)
    context_lens = decode_positions + 1
    return StepBatch(
        token_ids=token_ids,
        positions=device_positions,
        rope_lengths=rope_lengths,
        runs=runs.to(device),
        num_decode=len(plan.decode),
        decode=_decode_batch(plan, decode_slots, context_lens, slots, page_size) if plan.decode else None,
        prefill=_prefill_batch(plan, slots, page_size) if plan.prefill else None,
        context_lens=context_lens.tolist(),
    )


class _Runs:
    def __init__(self) -> None:
        self._parts: list[np.ndarray] = []

    def add(self, pages: np.ndarray, starts: np.ndarray, offsets: np.ndarray, counts: np.ndarray) -> None:
        self._parts.append(np.stack([pages, starts, offsets, counts]).astype(np.int32))

    def to(self, device: torch.device) -> AppendRuns:
        return AppendRuns(*torch.from_numpy(np.concatenate(self._parts, axis=1)).to(device, non_blocking=True).unbind(0))


def _with_device_tokens(token_ids: Tensor, plan: StepPlan, slots: SlotTable) -> Tensor:
    """Fill in the tokens that the shard sampled itself."""
    rows = [index for index, row in enumerate(plan.decode) if row.token is None]
    if not rows:
        return token_ids
    where = torch.tensor([rows, [plan.decode[row].slot for row in rows]], device=slots.device)
    token_ids = token_ids.clone()
    token_ids[where[0]] = slots.last_token[where[1]]
    return token_ids


def _decode_batch(
    plan: StepPlan, decode_slots: np.ndarray, context_lens: np.ndarray, slots: SlotTable, page_size: int
) -> DecodeBatch:
    num_pages = -(-context_lens // page_size)
    last_page_len = context_lens - (num_pages - 1) * page_size
    host = np.stack([decode_slots, num_pages, context_lens, last_page_len]).astype(np.int32)
    rows, *lengths = torch.from_numpy(host).to(slots.device, non_blocking=True).unbind(0)
    setups = [slots.setup(slot) for slot in decode_slots.tolist()]
    seeds = np.array([setup.seed for setup in setups], dtype=np.uint64)
    # the prompt is the same whichever sample computes it
    samples = np.array(
        [
            setup.sample_index if position >= setup.prompt_length else 0
            for setup, position in zip(setups, (context_lens - 1).tolist())
        ]
    )
    key = np.stack([seeds & np.uint64(0xFFFFFFFF), seeds >> np.uint64(32), samples, context_lens - 1]).astype(np.int64)
    table = slots.page_table[:, : int(num_pages.max())].index_select(0, rows)
    return DecodeBatch(
        page_table=table,
        num_pages=lengths[0],
        context_lens=lengths[1],
        last_page_len=lengths[2],
        random_key=torch.from_numpy(key).to(slots.device, non_blocking=True),
        max_context_len=int(context_lens.max()),
        page_size=page_size,
        trace=any(row.trace for row in plan.decode),
    )


def _prefill_batch(plan: StepPlan, slots: SlotTable, page_size: int) -> PrefillBatch:
    lengths = [len(chunk.tokens) for chunk in plan.prefill]
    context_lens = [chunk.start + length for chunk, length in zip(plan.prefill, lengths)]
    host = torch.tensor([[chunk.slot for chunk in plan.prefill], context_lens], dtype=torch.int32)
    rows, device_lens = host.to(slots.device, non_blocking=True).unbind(0)
    query_start = torch.tensor(np.r_[0, np.cumsum(lengths)], dtype=torch.int32).to(slots.device, non_blocking=True)
    table = slots.page_table[:, : -(-max(context_lens) // page_size)].index_select(0, rows)
    return PrefillBatch(table, query_start, device_lens, max(lengths))
