"""sampler: logits to tokens. Randomness is counter-based: a draw depends on its seed, sample index and position alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_sparse.driver.messages import LogprobBlock, SlotSetup
from distributed_sparse.kernels.philox import TOKEN_SAMPLING, philox, uniform


def sample(logits: Tensor, setups: Sequence[SlotSetup], positions: Sequence[int]) -> Tensor:
    """Draw one token per row.

    Masks in vLLM's order: temperature, min_p, top_k, top_p; then Gumbel-max, so a draw is an argmax and repeats exactly.

    Args:
        logits: float32 [R, V].
        setups: how each row's sequence samples.
        positions: the position that each sampled token will have.

    Returns:
        int64 [R].
    """
    logits = _suppress(logits, setups, positions)
    drawn = [row for row, setup in enumerate(setups) if setup.temperature > 0]
    if not drawn:
        return logits.argmax(-1)
    scores = logits.clone()  # the caller's logits are still wanted, for log-probabilities
    rows = torch.tensor(drawn, device=logits.device)
    chosen = [setups[row] for row in drawn]
    masked = mask_logits(logits[rows], chosen)
    scores[rows] = masked + gumbel(chosen, [positions[row] for row in drawn], logits.shape[1], logits.device)
    return scores.argmax(-1)


def mask_logits(logits: Tensor, setups: Sequence[SlotSetup]) -> Tensor:
    """float32 [R, V] logits over their temperature, -inf where min_p, top_k or top_p exclude a token."""

    def column(values: list[float] | list[int]) -> Tensor:
        return torch.tensor(values, device=logits.device)[:, None]

    logits = logits / column([setup.temperature for setup in setups])
    if any(setup.min_p > 0 for setup in setups):
        # p >= min_p * p_max, in logits; log(0) = -inf keeps everything
        floor = logits.amax(-1, keepdim=True) + column([setup.min_p for setup in setups]).log()
        logits = logits.masked_fill(logits < floor, -torch.inf)
    vocab_size = logits.shape[1]
    top_k = [setup.top_k if 0 < setup.top_k < vocab_size else vocab_size for setup in setups]
    if min(top_k) == vocab_size and all(setup.top_p >= 1 for setup in setups):
        return logits
    best, order = logits.sort(dim=-1, descending=True, stable=True)
    best = best.masked_fill(torch.arange(vocab_size, device=logits.device) >= column(top_k), -torch.inf)
    before = best.softmax(-1).cumsum(-1).roll(1, -1)  # mass of the tokens ahead; the best one always stays
    before[:, 0] = 0.0
    best = best.masked_fill(before >= column([setup.top_p if setup.top_p < 1 else 2.0 for setup in setups]), -torch.inf)
    return torch.empty_like(logits).scatter_(1, order, best)


def gumbel(setups: Sequence[SlotSetup], positions: Sequence[int], vocab_size: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise float32 [R, V]: key (request seed), counter (vocabulary quad, sample index, position, use)."""

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)[:, None]

    mask = 0xFFFFFFFF
    words = philox(
        (column([setup.seed & mask for setup in setups]), column([setup.seed >> 32 for setup in setups])),
        (
            torch.arange(-(-vocab_size // 4), device=device)[None],
            column([setup.sample_index for setup in setups]),
            column(list(positions)),
            torch.tensor(TOKEN_SAMPLING, device=device),
        ),
    )
    u = uniform(torch.stack(words, dim=-1)).flatten(1)[:, :vocab_size]
    return -(-u.log()).log()


def logprob_block(
    slot: int, position: int, logits: Tensor, tokens: Tensor, num_best: int, full_width: bool = False
) -> LogprobBlock:
    """Log-probabilities of given tokens, and of the best ones, from the raw logits (before temperature and masks).

    Args:
        slot, position: where the first row's token stands.
        logits: float32 [rows, V].
        tokens: int64 [rows] the sampled or target token of each row.
        num_best: best tokens beside it.
        full_width: send the whole vocabulary's log-probabilities instead.
    """
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, tokens[:, None])
    ranks = (logprobs > own).sum(-1, dtype=torch.int32) + 1
    if full_width:
        ids, values = b"", logprobs
    else:
        best, best_ids = logprobs.topk(num_best, dim=-1)
        ids = _bytes(torch.cat([tokens[:, None], best_ids], dim=1).to(torch.int32))
        values = torch.cat([own, best], dim=1)
    return LogprobBlock(slot, position, values.shape[0], values.shape[1], ids, _bytes(values), _bytes(ranks))


def _suppress(logits: Tensor, setups: Sequence[SlotSetup], positions: Sequence[int]) -> Tensor:
    """-inf at the tokens that would end a sequence before its min_tokens."""
    entries = [
        (row, token)
        for row, (setup, position) in enumerate(zip(setups, positions))
        if position < setup.suppress_until
        for token in setup.suppressed
    ]
    if not entries:
        return logits
    rows, tokens = torch.tensor(entries, device=logits.device).unbind(1)
    logits = logits.clone()
    logits[rows, tokens] = -torch.inf
    return logits


def _bytes(array: Tensor) -> bytes:
    return array.contiguous().cpu().numpy().tobytes()
