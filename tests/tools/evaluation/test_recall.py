"""The recall model answers with dense attention, and tells methods that find the facts from methods that do not.

Quest and the window are emulated here in a few lines on the queries and keys of transformers' own model, so that neither
the engine nor its kernels can hide a fault of the checkpoint, or the other way round.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distributed_sparse.tools.evaluation.recall import RecallPrompt, make_majority_prompts, make_prompts
from distributed_sparse.tools.evaluation.recall_model import save_recall_checkpoint
from distributed_sparse.tools.evaluation.recall_vocabulary import (
    ASK,
    ASK_TWICE,
    EOS,
    FIRST_SYMBOL,
    NUM_SYMBOLS,
)
from tests.support.grids import corners
from tests.support.recall_score import score

PAGE_SIZE = 16
DENSE_LAYERS = 2


@dataclass
class Emulation:
    """What one decode step may see: a number of pages, chosen by Quest's bound or by recency, page 0 and the newest forced."""

    method: str
    token_budget: int

    def mask(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """query [1, H_q, 1, d], key [1, H_kv, n, d] -> bool [1, H_kv, n]: one list per KV head, group maximum."""
        kv_heads, length, head_dim = key.shape[1:]
        num_pages, budget = -(-length // PAGE_SIZE), self.token_budget // PAGE_SIZE
        if self.method == "window":
            scores = torch.arange(num_pages, dtype=torch.float32).expand(kv_heads, -1).clone()
        else:
            repeats = num_pages * PAGE_SIZE - length  # the newest page, filled up with its last key
            padded = torch.cat([key[0], key[0, :, -1:].expand(-1, repeats, -1)], 1)
            pages = padded.view(kv_heads, num_pages, PAGE_SIZE, head_dim).float()
            low, high = pages.amin(2), pages.amax(2)
            q = query[0, :, 0].view(kv_heads, -1, 1, head_dim).float()
            scores = torch.maximum(q * low.unsqueeze(1), q * high.unsqueeze(1)).sum(-1).amax(1)
        scores[:, [0, -1]] = torch.inf
        chosen = scores.topk(min(budget, num_pages), -1).indices
        keep = torch.zeros(kv_heads, num_pages, dtype=torch.bool).scatter_(1, chosen, True)
        return keep.repeat_interleave(PAGE_SIZE, 1)[None, :, :length]


def emulated_attention(module, query, key, value, attention_mask, emulation=None, **kwargs):
    """transformers' sdpa attention, which sees only what the emulated method selects when it decodes one token."""
    if emulation is not None and query.shape[2] == 1 and module.layer_idx >= DENSE_LAYERS:
        groups = query.shape[1] // key.shape[1]
        attention_mask = emulation.mask(query, key).repeat_interleave(groups, 1).unsqueeze(2)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("emulated", emulated_attention)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("recall")
    save_recall_checkpoint(directory)
    return directory


def load(checkpoint, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation="emulated").eval()


@pytest.fixture(scope="module")
def model(checkpoint):
    return load(checkpoint)


@torch.inference_mode()
def prefill(model, token_ids: list[int]):
    return model(torch.tensor([token_ids]), use_cache=True, logits_to_keep=1).past_key_values


@torch.inference_mode()
def answer(model, document, cache, prompt: RecallPrompt, emulation=None) -> tuple[list[int], float]:
    """Decode the question and then the answer one token at a time; the answer, and the least lead of best over second."""
    cache = copy.deepcopy(cache)
    token_ids, margins = list(prompt.token_ids), []
    position = len(document)
    while len(token_ids) < len(prompt.token_ids) + len(prompt.answer_ids):
        for token in token_ids[position:]:
            logits = model(torch.tensor([[token]]), past_key_values=cache, emulation=emulation).logits[0, -1].float()
        position = len(token_ids)
        best = logits.topk(2)
        margins.append(float(best.values[0] - best.values[1]))
        token_ids.append(int(best.indices[0]))
    return token_ids[len(prompt.token_ids) :], min(margins)


def answers(model, prompts, emulations) -> list[tuple[float, float]]:
    """(accuracy, least margin) of each emulation over questions about one document, which is prefilled once."""
    document = prompts[0].token_ids[:-2]
    assert all(prompt.token_ids[:-2] == document for prompt in prompts)
    cache = prefill(model, document)
    results = []
    for emulation in emulations:
        outputs = [answer(model, document, cache, prompt, emulation) for prompt in prompts]
        results.append((score(prompts, [tokens for tokens, _ in outputs]).accuracy, min(margin for _, margin in outputs)))
    return results


@pytest.mark.slow
def test_quest_finds_the_facts_that_a_window_misses(model):
    prompts = make_prompts(num_facts=256, context_length=4096, num_queries=20, seed=1)
    methods = [None, Emulation("quest", 128), Emulation("quest", 48), Emulation("window", 256)]
    (dense, margin), (quest, _), (small, _), (window, _) = answers(model, prompts, methods)
    assert dense == 1.0
    assert margin > 8.0  # the standard deviation of the logits is about 4
    assert quest >= 0.95
    assert small < 0.8  # so the task can be failed: with one page of its own choice Quest takes wrong ones
    assert window <= 0.2


@pytest.mark.slow
def test_two_hops_are_answered_in_one_step_and_need_both_facts(model):
    prompts = make_prompts(num_facts=128, context_length=2048, num_queries=20, hops=2, seed=1)
    methods = [None, Emulation("quest", 128), Emulation("window", 256)]
    (dense, margin), (quest, _), (window, _) = answers(model, prompts, methods)
    assert dense == 1.0
    assert margin > 8.0
    assert quest >= 0.95
    assert window <= 0.2


def test_each_generated_symbol_is_the_next_question(model):
    prompts = make_prompts(num_facts=128, context_length=2048, num_queries=2, seed=2, answer_length=10)
    (dense, _), (quest, _), (window, _) = answers(model, prompts, [None, Emulation("quest", 128), Emulation("window", 128)])
    assert dense == 1.0
    assert quest >= 0.9
    assert window <= 0.3


def test_a_majority_needs_more_than_the_few_best_pages(model):
    prompts = make_majority_prompts(context_length=2048, num_queries=3, seed=3)
    methods = [None, Emulation("quest", 2048), Emulation("quest", 64)]
    dense, large, small = zip(*(answers(model, [prompt], methods) for prompt in prompts), strict=True)
    assert all(accuracy == 1.0 for accuracy, _ in (*dense, *large))
    assert not all(accuracy == 1.0 for accuracy, _ in small)


@pytest.mark.slow
def test_8k_tokens_do_not_turn_the_slow_rotary_pairs_too_far(model):
    prompts = make_prompts(num_facts=512, context_length=8192, num_queries=8, seed=4)
    ((dense, margin),) = answers(model, prompts, [None])
    assert dense == 1.0
    assert margin > 8.0


@pytest.mark.slow
def test_bfloat16_is_precise_enough(checkpoint):
    prompts = make_prompts(num_facts=128, context_length=2048, num_queries=10, seed=5)
    two_hops = make_prompts(num_facts=128, context_length=2048, num_queries=10, hops=2, seed=6)
    model = load(checkpoint, torch.bfloat16)
    for questions in (prompts, two_hops):
        (dense, margin), (quest, _) = answers(model, questions, [None, Emulation("quest", 128)])
        assert dense == 1.0
        assert margin > 8.0
        assert quest >= 0.9


def test_without_a_fact_the_model_says_that_it_knows_nothing(model):
    prompt = make_prompts(num_facts=16, context_length=512, num_queries=1, seed=7)[0]
    unknown = next(s for s in range(FIRST_SYMBOL, FIRST_SYMBOL + NUM_SYMBOLS) if s not in prompt.token_ids)
    asked = RecallPrompt([*prompt.token_ids[:-1], unknown], [EOS])
    for marker in (ASK, ASK_TWICE):
        asked.token_ids[-2] = marker
        ((accuracy, margin),) = answers(model, [asked], [None])
        assert accuracy == 1.0
        assert margin > 2.0


def roll_heads(weight, heads, shift):
    return weight.view(heads, -1, weight.shape[-1]).roll(shift, 0).reshape(weight.shape)


@pytest.mark.parametrize(
    ("wrong", "change"),
    [
        ("q heads read each other's KV head", lambda a: a.q_proj.weight.copy_(roll_heads(a.q_proj.weight, 16, 1))),
        ("q heads are interleaved, not grouped", lambda a: a.q_proj.weight.copy_(interleaved(a.q_proj.weight))),
        ("k of another KV head", lambda a: a.k_proj.weight.copy_(roll_heads(a.k_proj.weight, 8, 1))),
        ("v of another KV head", lambda a: a.v_proj.weight.copy_(roll_heads(a.v_proj.weight, 8, 1))),
        ("the halves of two ranks swapped in v", lambda a: a.v_proj.weight.copy_(roll_heads(a.v_proj.weight, 2, 1))),
        ("the halves of two ranks swapped in o", lambda a: a.o_proj.weight.copy_(a.o_proj.weight.roll(512, 1))),
    ],
)
@pytest.mark.each_value
@pytest.mark.parametrize("layer", [0, 2])
def test_a_wrong_head_mapping_cannot_pass(model, wrong, change, layer):
    attention = copy.deepcopy(model.model.layers[layer].self_attn)
    prompts = make_prompts(num_facts=24, context_length=400, num_queries=12, seed=8)
    assert answers(model, prompts, [None])[0][0] == 1.0
    broken = copy.deepcopy(model)
    with torch.no_grad():
        change(broken.model.layers[layer].self_attn)
    if all(torch.equal(a, b) for a, b in zip(attention.parameters(), broken.model.layers[layer].self_attn.parameters())):
        pytest.fail(f"{wrong}: the change changed nothing")
    assert answers(broken, prompts, [None])[0][0] <= 0.5, wrong


@pytest.mark.each_value
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("kv_head", corners(range(8), kept=(0, 7)))
def test_no_kv_head_may_be_missing(model, layer, kv_head):
    prompts = make_prompts(num_facts=48, context_length=800, num_queries=48, seed=9)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[layer].self_attn.v_proj.weight[64 * kv_head : 64 * (kv_head + 1)] = 0.0
    ((accuracy, _),) = answers(broken, prompts, [None])
    assert accuracy < 0.95


def interleaved(weight):
    """Heads 0, 8, 1, 9, ...: as if query head h read KV head h % 8."""
    order = [head for pair in zip(range(8), range(8, 16)) for head in pair]
    return weight.view(16, -1, weight.shape[-1])[order].reshape(weight.shape)
