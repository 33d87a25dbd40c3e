"""warm_up: plans on the null page, run before READY: they compile every kernel and measure the largest step's memory."""

from __future__ import annotations

from distributed_sparse.protocol.step import DecodeRow, PrefillChunk, SlotSetup, StepPlan


def warm_up_plan(num_decode: int, context_len: int, chunk_lens: list[int], num_targets: int = 0) -> StepPlan:
    """Decode rows in slots 0, 1, ..., and prompt chunks in slot 0; no slot has a page, so all is on the null page.

    Args:
        num_decode: decode rows, each of them sampled with every mask.
        context_len: tokens in the context of each.
        chunk_lens: tokens of each prompt chunk.
        num_targets: prompt tokens of the first chunk whose log-probabilities over the whole vocabulary are wanted.
    """
    setups = [
        SlotSetup(
            slot=slot,
            prompt_length=1,
            prefill_length=1,
            seed=0,
            sample_index=0,
            temperature=1.0,
            top_p=0.9,
            top_k=8,
            min_p=0.1,
            logprobs=None,
            suppressed=[],
            suppress_until=0,
        )
        for slot in range(max(num_decode, 1))
    ]
    chunks = [PrefillChunk(slot=0, start=0, tokens=[0] * length, samples=[]) for length in chunk_lens]
    if num_targets:
        chunks[0].targets, chunks[0].prompt_logprobs = [0] * num_targets, -1
    return StepPlan(
        step=0,
        generation=0,
        setups=setups,
        decode=[DecodeRow(slot=slot, position=context_len - 1, token=0, samples=[slot]) for slot in range(num_decode)],
        prefill=chunks,
    )
