"""warm_up: plans on the null page, run before READY: they compile every kernel and measure the largest step's memory."""

from __future__ import annotations

from distributed_sparse.driver.messages import DecodeRow, PrefillChunk, SlotSetup, StepPlan


def warm_up_plan(num_prompt_tokens: int, context_len: int) -> StepPlan:
    """One prompt chunk in slot 0 and one decode row, at the end of a context of null pages, in slot 0 as well.

    Args:
        num_prompt_tokens: tokens of the chunk.
        context_len: tokens in the decode row's context.
    """
    setup = SlotSetup(
        slot=0,
        prefill_length=num_prompt_tokens,
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
    return StepPlan(
        step=0,
        generation=0,
        setups=[setup],
        decode=[DecodeRow(slot=0, position=context_len - 1, token=0, samples=[0])],
        prefill=[PrefillChunk(slot=0, start=0, tokens=[0] * num_prompt_tokens, samples=[])],
    )
