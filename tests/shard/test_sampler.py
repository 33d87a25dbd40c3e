"""A draw follows the softmax that is left after the masks, and depends on seed, sample and position alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from distributed_sparse import SamplingParams
from distributed_sparse.client.output_builder import block_arrays
from distributed_sparse.llm import LLM
from distributed_sparse.protocol.step import SlotSetup
from distributed_sparse.shard.sampler import Draws, gumbel, logprob_block, mask_logits
from distributed_sparse.shard.sampler import sample as sample_draws
from tests.support.checkpoints import tiny_checkpoint
from tests.support.engine import make_llm
from tests.support.prompts import random_tokens

pytestmark = pytest.mark.each_value

VOCAB_SIZE = 331


def setup(**given: Any) -> SlotSetup:
    """A sequence that samples at temperature 1, unless told otherwise."""
    defaults: dict[str, Any] = {
        "slot": 0,
        "prompt_length": 1,
        "prefill_length": 1,
        "seed": 1,
        "sample_index": 0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "logprobs": None,
        "suppressed": [],
        "suppress_until": 0,
    }
    return SlotSetup(**{**defaults, **given})


def draws_of(setups: list[SlotSetup], positions: list[int], vocab_size: int) -> Draws:
    return Draws.of(setups, positions, vocab_size, torch.device("cpu"))


def sample(logits: Tensor, setups: list[SlotSetup], positions: list[int]) -> Tensor:
    """One token per row, as `setups` say."""
    return sample_draws(logits, draws_of(setups, positions, logits.shape[1]))[0]


def masked_by(logits: Tensor, setups: list[SlotSetup]) -> Tensor:
    """Masks do not depend on positions."""
    return mask_logits(logits, draws_of(setups, [0] * len(setups), logits.shape[1]))


def random_logits(rows: int, vocab_size: int = VOCAB_SIZE, seed: int = 0, spread: float = 2.0) -> Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


# ---- masks


def kept_by_reference(logits: np.ndarray, temperature: float, min_p: float, top_k: int, top_p: float) -> set[int]:
    """One row, one rule after the other, in float64: temperature, min_p, top_k, top_p."""
    scaled = logits.astype(np.float64) / temperature
    probability = np.exp(scaled - scaled.max())
    kept = [token for token in range(len(logits)) if probability[token] >= min_p]  # the best one's is 1
    kept.sort(key=lambda token: (-scaled[token], token))
    if top_k:
        kept = kept[:top_k]
    total, mass, nucleus = sum(probability[kept]), 0.0, []
    for token in kept:
        if mass < top_p * total:
            nucleus.append(token)
        mass += probability[token]
    return set(nucleus if top_p < 1 else kept)


MASKS: list[dict[str, Any]] = [
    {"temperature": temperature, "min_p": min_p, "top_k": top_k, "top_p": top_p}
    for temperature in (0.3, 1.0, 2.5)
    for min_p, top_k, top_p in [
        (0.0, 0, 1.0),
        (0.1, 0, 1.0),
        (0.0, 7, 1.0),
        (0.0, 0, 0.6),
        (0.05, 20, 0.9),
        (0.02, 5, 0.999),
        (1.0, 0, 1.0),
        (0.0, 1, 1.0),
        (0.0, 0, 1e-6),
        (0.0, VOCAB_SIZE + 9, 0.5),
    ]
]


def test_masks_keep_the_tokens_that_the_rules_name_row_by_row() -> None:
    """All combinations in one batch, so that no row's parameters reach another."""
    logits = random_logits(len(MASKS))
    masked = masked_by(logits, [setup(**mask) for mask in MASKS])
    sizes = set()
    for row, mask in enumerate(MASKS):
        expected = kept_by_reference(logits[row].numpy(), **mask)
        kept = torch.isfinite(masked[row])
        assert set(kept.nonzero().flatten().tolist()) == expected, mask
        assert torch.equal(masked[row][kept], (logits[row] / mask["temperature"])[kept])
        assert (masked[row][~kept] == -math.inf).all()
        sizes.add(len(expected))
    assert {1, 5, 7, VOCAB_SIZE} <= sizes and len(sizes) > 10


@pytest.mark.parametrize("row", range(0, len(MASKS), 3))
def test_a_mask_alone_is_the_mask_in_a_batch(row: int) -> None:
    logits = random_logits(len(MASKS))
    together = masked_by(logits, [setup(**mask) for mask in MASKS])
    assert torch.equal(masked_by(logits[row : row + 1], [setup(**MASKS[row])])[0], together[row])


def test_masks_hold_in_draws() -> None:
    """2,000 draws of each combination: only tokens that are kept, and each of few that are."""
    logits = random_logits(1, vocab_size=40, seed=2)
    for mask in MASKS:
        found = draws(logits, 2000, **mask)
        kept = kept_by_reference(logits[0].numpy(), **mask)
        assert set(found.tolist()) <= kept
        if mask["temperature"] >= 1.0 and len(kept) <= 5:
            assert set(found.tolist()) == kept


# ---- draws


def draws(logits: Tensor, count: int, first_position: int = 0, **given: Any) -> Tensor:
    """int64 [count]: the same row drawn at so many positions."""
    positions = list(range(first_position, first_position + count))
    return sample(logits.expand(count, -1), [setup(**given)] * count, positions)


@pytest.mark.parametrize("vocab_size", [2, 5, 64])
@pytest.mark.parametrize("mask", [{}, {"temperature": 0.6}, {"temperature": 1.7, "top_k": 4}, {"top_p": 0.8}, {"min_p": 0.2}])
@pytest.mark.parametrize("what", ["positions", "seeds", "samples"])
def test_frequencies_follow_the_softmax(vocab_size: int, mask: dict[str, Any], what: str) -> None:
    """Chi-square over 20,000 draws that differ in nothing but their position, their seed, or their sample's index."""
    count = 20000
    logits = random_logits(1, vocab_size, seed=vocab_size, spread=0.7)
    steps = list(range(count))
    setups = [
        setup(seed=step if what == "seeds" else 5, sample_index=step if what == "samples" else 0, **mask) for step in steps
    ]
    positions = steps if what == "positions" else [77] * count
    found = torch.bincount(sample(logits.expand(count, -1), setups, positions), minlength=vocab_size)
    expected = masked_by(logits, [setup(**mask)])[0].double().softmax(-1) * count
    assert not found[expected == 0].any()
    kept = expected > 0
    if kept.sum() > 1:
        assert expected[kept].min() > 5
        assert scipy.stats.chisquare(found[kept].numpy(), expected[kept].numpy()).pvalue > 1e-4


def test_draws_at_neighbouring_positions_are_independent() -> None:
    logits = torch.zeros(1, 4)
    found = draws(logits, 40000, seed=3)
    pairs = torch.bincount(found[:-1] * 4 + found[1:], minlength=16)
    assert scipy.stats.chisquare(pairs.numpy()).pvalue > 1e-4


def test_noise_has_the_mean_and_spread_of_a_standard_gumbel() -> None:
    noise = gumbel(draws_of([setup()] * 64, list(range(64)), 1001), 1001).double()
    assert noise.shape == (64, 1001) and torch.isfinite(noise).all()
    error = (math.pi**2 / 6 / noise.numel()) ** 0.5
    assert abs(noise.mean() - np.euler_gamma) < 4 * error
    assert noise.std() == pytest.approx(math.pi / 6**0.5, rel=0.02)
    assert len(noise.unique()) > 0.95 * noise.numel()


def test_greedy_takes_the_most_likely_token_and_the_first_of_equals() -> None:
    logits = random_logits(4)
    logits[2, 100] = logits[2, 30] = 50.0
    found = sample(logits, [setup(temperature=0.0, seed=seed) for seed in range(4)], [9, 8, 7, 6])
    assert found.dtype == torch.int64 and found.tolist() == logits.argmax(-1).tolist()
    assert found[2] == 30


MIXED: list[dict[str, Any]] = [
    {"seed": 11, "temperature": 1.0},
    {"seed": 12, "temperature": 0.0},
    {"seed": 11, "temperature": 1.0, "sample_index": 1},
    {"seed": 2**62 + 5, "temperature": 2.0, "top_k": 50},
    {"seed": 5, "temperature": 1.5, "top_p": 0.9},
    {"seed": 2**33 + 5, "temperature": 1.5, "min_p": 0.01},
    {"seed": 7, "temperature": 3.0, "suppressed": [1, 2, 3], "suppress_until": 1000},
]


@pytest.mark.parametrize("order", [[6, 5, 4, 3, 2, 1, 0], [0, 2, 4], [3], [1], [5, 5, 1, 0]])
def test_a_draw_is_the_same_alone_in_a_batch_in_another_slot_and_in_any_order(order: list[int]) -> None:
    logits, positions = random_logits(len(MIXED), spread=0.5), [40, 41, 40, 3, 900, 17, 40]
    together = sample(logits, [setup(slot=slot, **given) for slot, given in enumerate(MIXED)], positions)
    some = sample(
        logits[order], [setup(slot=9 - place, **MIXED[row]) for place, row in enumerate(order)], [positions[i] for i in order]
    )
    assert some.tolist() == together[order].tolist()


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"seed": 1 + 2**32}, {"seed": 1 + 2**62}, {"sample_index": 1}, {"first_position": 1000}]
)
def test_another_seed_sample_or_position_is_another_draw(change: dict[str, int]) -> None:
    logits = torch.zeros(1, VOCAB_SIZE)
    same = (draws(logits, 500) == draws(logits, 500, **change)).double().mean()
    assert same < 0.02  # 1/331 by chance
    assert torch.equal(draws(logits, 500), draws(logits, 500))


def test_drawing_changes_neither_the_logits_nor_torchs_generator() -> None:
    logits, state = random_logits(len(MIXED)), torch.get_rng_state()
    before = logits.clone()
    sample(logits, [setup(**given) for given in MIXED], [5] * len(MIXED))
    assert torch.equal(logits, before) and torch.equal(torch.get_rng_state(), state)


def test_suppressed_tokens_are_not_drawn_before_their_position() -> None:
    logits = torch.zeros(1, 5)
    logits[0, 3] = 30.0
    suppressed: dict[str, Any] = {"suppressed": [3, 4], "suppress_until": 100}
    for temperature in (0.0, 1.0):
        before = draws(logits, 100, temperature=temperature, **suppressed)
        assert not {3, 4} & set(before.tolist())
        assert set(draws(logits, 100, first_position=100, temperature=temperature, **suppressed).tolist()) == {3}
    # A neighbour in the batch is not touched.
    rows = sample(logits.expand(2, -1), [setup(temperature=0.0, **suppressed), setup(temperature=0.0)], [5, 5])
    assert rows.tolist() == [0, 3]


def test_suppression_comes_before_the_masks() -> None:
    """Else top_k = 1 would keep the suppressed token alone, and nothing could be drawn."""
    logits = random_logits(1)
    best, second = logits[0].topk(2).indices.tolist()
    masks: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}]
    for mask in masks:
        assert draws(logits, 10, suppressed=[best], suppress_until=100, **mask).tolist() == [second] * 10


# ---- log-probabilities


@pytest.mark.parametrize("num_best", [0, 1, 5, VOCAB_SIZE])
def test_log_probabilities_and_ranks_are_those_of_the_raw_logits(num_best: int) -> None:
    logits = random_logits(6)
    logits[5, :] = 0.0  # all equal: every token has rank 1
    tokens = torch.tensor([0, int(logits[1].argmax()), int(logits[2].argmin()), 330, 7, 9])
    block = logprob_block(3, 40, logits, tokens, num_best)
    ids, values, ranks = block_arrays(block)
    expected = logits.double().log_softmax(-1)
    assert (block.slot, block.position, block.rows, block.width) == (3, 40, 6, num_best + 1)
    assert ids is not None and ids[:, 0].tolist() == tokens.tolist()
    np.testing.assert_allclose(values, expected.gather(1, torch.from_numpy(ids.astype(np.int64))).numpy(), atol=1e-5)
    order = logits[:5].argsort(descending=True, stable=True, dim=-1)
    assert ids[:5, 1:].tolist() == order[:, :num_best].tolist()
    assert ranks[:5].tolist() == [order[row].tolist().index(int(tokens[row])) + 1 for row in range(5)]
    assert ranks[1] == 1 and ranks[2] == VOCAB_SIZE and ranks[5] == 1


def test_the_whole_vocabulary_comes_in_the_order_of_token_ids() -> None:
    logits, tokens = random_logits(3), torch.tensor([5, 6, 7])
    ids, values, ranks = block_arrays(logprob_block(0, 1, logits, tokens, 0, full_width=True))
    assert ids is None and values.shape == (3, VOCAB_SIZE)
    np.testing.assert_allclose(values, logits.double().log_softmax(-1).numpy(), atol=1e-5)
    assert ranks.tolist() == [int((logits[row] > logits[row, token]).sum()) + 1 for row, token in enumerate(tokens)]


# ---- the whole stack


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def llm(path: Path) -> Iterator[LLM]:
    with make_llm(path, max_num_seqs=16) as llm:
        yield llm


def tokens_of(llm: LLM, prompts: list[list[int]], params: list[SamplingParams]) -> list[list[list[int]]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def test_a_seed_gives_the_same_tokens_alone_in_another_batch_and_in_a_smaller_engine(path: Path, llm: LLM) -> None:
    prompts = [random_tokens(length, seed=length) for length in (30, 45, 8, 61)]
    params = [
        SamplingParams(temperature=1.0, seed=3, max_tokens=25, n=2),
        SamplingParams(temperature=0.7, top_p=0.9, seed=3, max_tokens=30),
        SamplingParams(temperature=2.0, top_k=40, seed=10, max_tokens=10, n=3),
        SamplingParams(temperature=1.0, min_p=0.02, seed=2**62, max_tokens=25),
    ]
    together = tokens_of(llm, prompts, params)
    assert tokens_of(llm, prompts[::-1], params[::-1]) == together[::-1]
    assert [tokens_of(llm, [prompt], [own])[0] for prompt, own in zip(prompts, params)] == together
    with make_llm(path, max_num_seqs=3, max_num_batched_tokens=10, seed=99) as small:
        assert tokens_of(small, prompts, params) == together


def test_samples_of_one_request_differ_and_the_first_is_what_n_1_gives(llm: LLM) -> None:
    def params(n: int) -> SamplingParams:
        return SamplingParams(temperature=1.0, seed=8, max_tokens=20, n=n, ignore_eos=True)

    prompt = random_tokens(37)
    (four,), (one,) = tokens_of(llm, [prompt], [params(4)]), tokens_of(llm, [prompt], [params(1)])
    assert len({str(sample) for sample in four}) == 4 and {len(sample) for sample in four} == {20}
    assert one[0] == four[0]


def test_min_tokens_keeps_every_ending_token_away(path: Path, llm: LLM) -> None:
    """The greedy continuation's first tokens are made to end the output; with min_tokens none of them may come early."""
    prompt = random_tokens(25)
    (free,) = tokens_of(llm, [prompt], [SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)])[0]
    stops = sorted(set(free[:4]))
    common: dict[str, Any] = {"temperature": 0.0, "max_tokens": 30, "stop_token_ids": stops}
    at_once, later = llm.generate([prompt] * 2, [SamplingParams(**common), SamplingParams(min_tokens=12, **common)], False)
    assert at_once.outputs[0].token_ids == free[:1] and at_once.outputs[0].stop_reason == free[0]
    tokens = later.outputs[0].token_ids
    assert len(tokens) >= 13 and not set(stops) & set(tokens[:12]) and 2 not in tokens[:12]
    if later.outputs[0].finish_reason == "stop":
        assert tokens[-1] in stops or tokens[-1] == 2


def test_log_probabilities_of_an_output_are_those_that_score_gives(llm: LLM) -> None:
    """Raw, before temperature and masks; the sampled token first, then the best ones, each with its rank."""
    prompt = random_tokens(20)
    params = SamplingParams(temperature=1.5, top_k=30, seed=4, max_tokens=15, logprobs=3, prompt_logprobs=2, ignore_eos=True)
    (output,) = llm.generate([prompt], params, use_tqdm=False)
    (completion,) = output.outputs
    (score,) = llm.score(prompt + completion.token_ids, whole_vocabulary=True, decode_last_prompt_tokens=15)
    assert score.logprobs is not None and completion.logprobs is not None and output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    rows = [*output.prompt_logprobs[1:], *completion.logprobs]
    targets = [*prompt[1:], *completion.token_ids]
    assert len(rows) == len(targets) == len(score.logprobs)
    for place, (row, token, expected) in enumerate(zip(rows, targets, score.logprobs)):
        assert row is not None
        best = np.argsort(-expected)[: 2 if place < len(prompt) - 1 else 3].tolist()
        assert list(row) == list(dict.fromkeys([token, *best]))
        for known, logprob in row.items():
            assert logprob.logprob == pytest.approx(expected[known], abs=1e-4)
            assert logprob.rank == int((expected > expected[known]).sum()) + 1
    own = [row[token].logprob for row, token in zip(completion.logprobs, completion.token_ids)]
    assert completion.cumulative_logprob == pytest.approx(sum(own))


def test_the_first_token_follows_the_models_softmax(llm: LLM) -> None:
    """Through the whole stack: 400 seeds, the frequency of the model's likeliest tokens against their probability."""
    prompt, count = random_tokens(12, seed=6), 400
    params = [SamplingParams(temperature=0.5, seed=seed, max_tokens=1) for seed in range(count)]
    found = [tokens[0][0] for tokens in tokens_of(llm, [prompt] * count, params)]
    (output,) = llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1, logprobs=VOCAB_SIZE), use_tqdm=False)
    rows = output.outputs[0].logprobs
    assert rows is not None
    logits = torch.tensor([rows[0][token].logprob for token in range(VOCAB_SIZE)], dtype=torch.float64)
    probability = (logits / 0.5).softmax(-1)
    likely = [token for token in range(VOCAB_SIZE) if probability[token] * count >= 5]
    assert len(likely) >= 3
    observed = [found.count(token) for token in likely]
    expected = [float(probability[token]) * count for token in likely]
    rest = (count - sum(observed), count - sum(expected))
    assert rest[1] > 1
    assert scipy.stats.chisquare([*observed, rest[0]], [*expected, rest[1]]).pvalue > 1e-4


# ---- logits that are no numbers


@pytest.mark.parametrize("mask", [{"temperature": 0.0}, *MASKS[::4]])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_score_is_not_finite_where_logits_are_not_and_other_rows_are_drawn_as_ever(
    mask: dict[str, Any], value: float
) -> None:
    """The token is one of the vocabulary all the same: the next step, which may be queued already, reads it."""
    logits = random_logits(3)
    setups, positions = [setup(**mask), setup(**mask), setup(temperature=0.0)], [5, 6, 7]
    expected, scores = sample_draws(logits, draws_of(setups, positions, VOCAB_SIZE))
    assert scores.isfinite().all()
    logits[1, slice(None) if value < 0 else 40] = value
    found, scores = sample_draws(logits, draws_of(setups, positions, VOCAB_SIZE))
    assert scores.isfinite().tolist() == [True, False, True]
    assert found[[0, 2]].tolist() == expected[[0, 2]].tolist() and 0 <= found[1] < VOCAB_SIZE


def test_a_score_is_minus_infinity_where_every_token_is_suppressed() -> None:
    both = [setup(suppressed=list(range(VOCAB_SIZE)), suppress_until=9), setup()]
    _, scores = sample_draws(random_logits(2), draws_of(both, [8, 8], VOCAB_SIZE))
    assert scores[0] == -math.inf and scores[1].isfinite()
