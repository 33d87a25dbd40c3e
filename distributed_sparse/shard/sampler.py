"""sampler: samples tokens from logits. Counter-based random numbers: a draw depends on seed, sample index and position only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from distributed_sparse.kernels.philox import TOKEN_SAMPLING, philox, uniform
from distributed_sparse.protocol.step import LogprobBlock, SlotSetup
from distributed_sparse.shard.sampling_table import SamplingTable


@dataclass(frozen=True)
class Draws:
    """Sampling parameters of R tokens, D <= R of them at temperature > 0. Parameters that no token uses are None.

    suppressed:  int64 [E]        entries of the flattened logits that are masked (min_tokens)
    drawn:       int64 [D]        rows at temperature > 0; the others are greedy. None: D = R
    temperature: float32 [D, 1]   None: all rows are greedy
    random_key:  int64 [4, D, 1]  low and high 32 bits of the seed, sample index, position of the token
    min_p:       float32 [D, 1]
    top_k:       int64 [D, 1]     the vocabulary size if disabled
    top_p:       float32 [D, 1]   2 if disabled
    """

    suppressed: Tensor | None = None
    drawn: Tensor | None = None
    temperature: Tensor | None = None
    random_key: Tensor | None = None
    min_p: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None

    @classmethod
    def of(cls, setups: Sequence[SlotSetup], positions: Sequence[int], vocab_size: int, device: torch.device) -> Draws:
        """For callers outside a step: one slot setup per row, and the position of each row's token."""
        table = SamplingTable(len(setups))
        for row, setup in enumerate(setups):
            table.set(row, setup)
        arrays = table.draws(np.arange(len(setups)), np.array(positions, dtype=np.int64), vocab_size)
        return cls(**{name: torch.from_numpy(array).to(device) for name, array in arrays.items()})


def sample(logits: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Sample one token per row.

    Masks in vLLM's order: temperature, min_p, top_k, top_p; then Gumbel-max, so a draw is an argmax and repeats exactly.
    Does not modify `logits` and does not synchronise.

    Args:
        logits: float32 [R, V].
        draws: sampling parameters.

    Returns:
        Tokens int64 [R], each in 0..V - 1, and their scores float32 [R], which are finite unless the row's logits are NaN or
        infinite, or every token is masked.
    """
    if draws.suppressed is not None:
        logits = logits.flatten().index_fill(0, draws.suppressed, -torch.inf).view_as(logits)
    if draws.temperature is None:
        scores, tokens = logits.max(-1)
        return tokens, scores
    of_drawn = logits if draws.drawn is None else logits.index_select(0, draws.drawn)
    scores = mask_logits(of_drawn, draws) + gumbel(draws, logits.shape[1])
    if draws.drawn is not None:
        scores = logits.index_copy(0, draws.drawn, scores)
    best, tokens = scores.max(-1)
    return tokens, best


def mask_logits(logits: Tensor, draws: Draws) -> Tensor:
    """float32 [D, V] logits divided by temperature; -inf if min_p, top_k or top_p exclude a token."""
    assert draws.temperature is not None
    logits = logits / draws.temperature
    if draws.min_p is not None:
        # p >= min_p * p_max, in logits; log(0) = -inf keeps everything
        floor = logits.amax(-1, keepdim=True) + draws.min_p.log()
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if draws.top_k is None or draws.top_p is None:
        return logits
    best, order = logits.sort(dim=-1, descending=True, stable=True)
    best = best.masked_fill(torch.arange(logits.shape[1], device=logits.device) >= draws.top_k, -torch.inf)
    before = best.softmax(-1).cumsum(-1).roll(1, -1)  # mass of better tokens; the best token always stays
    before.select(1, 0).zero_()
    best = best.masked_fill(before >= draws.top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(1, order, best)


def gumbel(draws: Draws, vocab_size: int) -> Tensor:
    """Standard Gumbel noise float32 [D, V]: key (request seed), counter (vocabulary quad, sample index, position, use)."""
    assert draws.random_key is not None
    seed_low, seed_high, sample_index, position = draws.random_key
    quad = torch.arange(-(-vocab_size // 4), device=position.device)[None]
    use = torch.full_like(quad, TOKEN_SAMPLING)
    words = philox((seed_low, seed_high), (quad, sample_index, position, use))
    u = uniform(torch.stack(words, dim=-1)).flatten(1)[:, :vocab_size]
    return -(-u.log()).log()


def logprob_block(
    slot: int, position: int, logits: Tensor, tokens: Tensor, num_best: int, full_width: bool = False
) -> LogprobBlock:
    """Log-probabilities of given tokens and of the best ones, from the raw logits (before temperature and masks).

    Args:
        slot, position: of the first row's token.
        logits: float32 [rows, V].
        tokens: int64 [rows] the sampled or target token of each row.
        num_best: number of best tokens beside it.
        full_width: return the whole vocabulary's log-probabilities instead.
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


def _bytes(array: Tensor) -> bytes:
    return array.contiguous().cpu().numpy().tobytes()
