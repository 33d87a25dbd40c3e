"""The recall model answers with dense attention, and tells methods that find the facts from methods that do not.

Quest and the window are emulated here in a few lines on the queries and keys of transformers' own model, so that neither
the engine nor its kernels can hide a fault of the checkpoint, or the other way round.
"""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from distributed_sparse.evaluation.recall import RecallPrompt, make_majority_prompts, make_prompts, score
from distributed_sparse.evaluation.recall_model import save_recall_checkpoint
from distributed_sparse.evaluation.recall_vocabulary import (
    ASK,
    ASK_TWICE,
    BOS,
    EOS,
    FIRST_SYMBOL,
    MARKERS,
    NUM_SYMBOLS,
    codewords,
    symbol_name,
)

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


@pytest.fixture(scope="module")
def one_hop():
    return make_prompts(num_facts=256, context_length=4096, num_queries=40, seed=0)


def test_quest_finds_the_facts_that_a_window_misses(model, one_hop):
    (dense, margin), (quest, _), (small, _), (smaller, _), (window, _) = answers(
        model,
        one_hop,
        [None, Emulation("quest", 128), Emulation("quest", 64), Emulation("quest", 48), Emulation("window", 256)],
    )
    assert dense == 1.0
    assert margin > 8.0
    assert quest >= 0.95
    assert smaller < 0.8
    assert smaller <= small <= quest
    assert window <= 0.2
