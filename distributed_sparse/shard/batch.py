"""batch: lays out a step plan's tokens on the host (StepLayout), and makes the input of one forward pass (StepBatch).

Decode rows come first, then the prompt chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed_sparse.cache import AppendRuns
from distributed_sparse.protocol.step import DecodeRow, PrefillChunk, StepPlan
from distributed_sparse.selection.base import DecodeBatch
from distributed_sparse.shard.inputs import Arrays
from distributed_sparse.shard.slots import SlotTable


@dataclass(frozen=True)
class StepLayout:
    """A step's tokens on the host.

    Attributes:
        arrays: arrays to upload, by name. Decode steps with equal numbers of rows have equal names and shapes.
        num_decode: decode rows, padding included.
        context_lens: of the decode rows, without padding.
        max_context_len: the longest of them; 0 if there are none.
        max_chunk_len: tokens of the longest prompt chunk.
        max_chunk_end: tokens of the longest context at the end of a prompt chunk.
        takes_sampled: whether the input token of a decode row is the one last sampled on the device.
        trace: whether a decode row is traced.
    """

    arrays: Arrays
    num_decode: int
    context_lens: list[int]
    max_context_len: int
    max_chunk_len: int
    max_chunk_end: int
    takes_sampled: bool
    trace: bool

    @classmethod
    def of_decode(cls, num_rows: int, max_context_len: int) -> StepLayout:
        """The layout that a captured decode step stands for: `num_rows` rows, padding included, contexts up to a length."""
        return cls({}, num_rows, [], max_context_len, 0, 0, takes_sampled=True, trace=False)


@dataclass(frozen=True)
class PrefillBatch:
    """The prompt chunks of a step: see `kernels/attend/prefill_attend.py`."""

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


def build_layout(plan: StepPlan, slots: SlotTable, page_size: int, num_rows: int | None = None) -> StepLayout:
    """Lay out a step plan's tokens. Call `slots.apply(plan)` first, for the new pages.

    Args:
        num_rows: pad a batch without prompt chunks to this many decode rows. A padded row has no context and no page: nothing
            is appended for it, and it attends to nothing.
    """
    num_rows = len(plan.decode) if num_rows is None else num_rows
    assert num_rows == len(plan.decode) or not plan.prefill, "prompt tokens follow the decode rows"
    decode = _decode_arrays(plan.decode, slots, page_size, num_rows)
    chunks = [_chunk_arrays(chunk, slots, page_size) for chunk in plan.prefill]
    starts = num_rows + np.cumsum([0, *(chunk.num_tokens for chunk in plan.prefill)])
    for chunk, start in zip(chunks, starts):
        chunk["run_starts"] += start
    arrays = {
        name: np.concatenate([array, *(chunk[name] for chunk in chunks)]).astype(array.dtype) if name in _OF_TOKENS else array
        for name, array in decode.items()
    }
    if chunks:
        arrays["chunk_slots"] = np.array([chunk.slot for chunk in plan.prefill], dtype=np.int64)
        arrays["chunk_starts"] = (starts - num_rows).astype(np.int32)
        arrays["chunk_ends"] = np.array([chunk.end for chunk in plan.prefill], dtype=np.int32)
    context_lens = [row.end for row in plan.decode]
    return StepLayout(
        arrays=arrays,
        num_decode=num_rows,
        context_lens=context_lens,
        max_context_len=max(context_lens, default=0),
        max_chunk_len=max((chunk.num_tokens for chunk in plan.prefill), default=0),
        max_chunk_end=max((chunk.end for chunk in plan.prefill), default=0),
        takes_sampled=any(row.token is None for row in plan.decode),
        trace=any(row.trace for row in plan.decode),
    )


_OF_TOKENS = ("token_ids", "positions", "rope_lengths", "run_pages", "run_starts", "run_offsets", "run_counts")
"""Arrays that decode rows and prompt chunks share."""


def _decode_arrays(decode: list[DecodeRow], slots: SlotTable, page_size: int, num_rows: int) -> Arrays:
    given = np.array([(row.slot, row.position, -1 if row.token is None else row.token) for row in decode], dtype=np.int64)
    padded = np.zeros((num_rows, 3), dtype=np.int64)
    padded[: len(decode)] = given.reshape(-1, 3)
    slot, position, token = padded.T
    slots.check(slot[: len(decode)])
    is_real = np.arange(num_rows) < len(decode)
    context_lens = np.where(is_real, position + 1, 0)
    num_pages = -(-context_lens // page_size)
    random_key = slots.sampling.random_key(slot, position)
    random_key[2] = np.where(position >= slots.prompt_length[slot], random_key[2], 0)  # all samples share the prompt
    return {
        "token_ids": np.maximum(token, 0),
        "positions": position,
        "rope_lengths": np.maximum(position + 1, slots.prefill_length[slot]),
        "run_pages": np.where(is_real, slots.host_page_table[slot, position // page_size], 0).astype(np.int32),
        "run_starts": np.arange(num_rows, dtype=np.int32),
        "run_offsets": (position % page_size).astype(np.int32),
        "run_counts": is_real.astype(np.int32),
        "is_sampled": token < 0,
        "slots": slot,
        "num_pages": num_pages.astype(np.int32),
        "context_lens": context_lens.astype(np.int32),
        "last_page_len": (context_lens - (num_pages - 1) * page_size).astype(np.int32),
        "random_key": random_key,
    }


def _chunk_arrays(chunk: PrefillChunk, slots: SlotTable, page_size: int) -> Arrays:
    """One prompt chunk's tokens, and one run per page that they touch; `run_starts` count from the chunk's first token."""
    slots.check(np.array([chunk.slot]))
    positions = np.arange(chunk.start, chunk.end)
    first_page, last_page = chunk.start // page_size, (chunk.end - 1) // page_size
    pages = np.arange(first_page, last_page + 1)
    begins = np.maximum(pages * page_size, chunk.start)
    ends = np.minimum((pages + 1) * page_size, chunk.end)
    return {
        "token_ids": np.array(chunk.tokens, dtype=np.int64),
        "positions": positions,
        "rope_lengths": np.maximum(positions + 1, slots.prefill_length[chunk.slot]),
        "run_pages": slots.host_page_table[chunk.slot, pages],
        "run_starts": begins - chunk.start,
        "run_offsets": begins % page_size,
        "run_counts": ends - begins,
    }


def make_batch(layout: StepLayout, views: Mapping[str, Tensor], slots: SlotTable, page_size: int) -> StepBatch:
    """The input of a forward pass, from a layout's arrays on the device (`views`)."""
    num_decode = layout.num_decode
    if layout.takes_sampled:
        token_ids = views["token_ids"][:num_decode]
        torch.where(views["is_sampled"], slots.last_token.index_select(0, views["slots"]), token_ids, out=token_ids)
    decode = None
    if num_decode:
        decode = DecodeBatch(
            page_table=slots.page_table[:, : -(-layout.max_context_len // page_size)].index_select(0, views["slots"]),
            num_pages=views["num_pages"],
            context_lens=views["context_lens"],
            last_page_len=views["last_page_len"],
            random_key=views["random_key"],
            max_context_len=layout.max_context_len,
            page_size=page_size,
            trace=layout.trace,
        )
    prefill = None
    if layout.max_chunk_len:
        table = slots.page_table[:, : -(-layout.max_chunk_end // page_size)].index_select(0, views["chunk_slots"])
        prefill = PrefillBatch(table, views["chunk_starts"], views["chunk_ends"], layout.max_chunk_len)
    return StepBatch(
        token_ids=views["token_ids"],
        positions=views["positions"],
        rope_lengths=views["rope_lengths"],
        runs=AppendRuns(*(views[f"run_{name}"] for name in ("pages", "starts", "offsets", "counts"))),
        num_decode=num_decode,
        decode=decode,
        prefill=prefill,
    )
