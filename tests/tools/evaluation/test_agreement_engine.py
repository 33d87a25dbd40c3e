"""agreement through the engine: its numbers are those of transformers' logits, and its bytes those of plain arithmetic."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distributed_sparse.config import EngineConfig
from distributed_sparse.tools.common.results import Results
from distributed_sparse.tools.evaluation.evaluation_report import report
from distributed_sparse.tools.evaluation.evaluation_summary import RunSummary, summarise_run
from distributed_sparse.tools.evaluation.meter import decode_contexts
from distributed_sparse.tools.evaluation.methods import settings_key
from distributed_sparse.tools.evaluation.run_suite import Evaluation, RunOptions
from distributed_sparse.tools.evaluation.suites.agreement import AgreementSuite
from tests.support.checkpoints import tiny_checkpoint
from tests.support.prompts import random_tokens
from tests.support.transformers_reference import PageMethod, reference_logits

LENGTHS, DECODED, PAGE = (128, 200), 20, 16
QUEST: dict[str, Any] = {"method": "quest", "token_budget": 48, "recent_pages": 1, "dense_layers": 1}
COVERS: dict[str, Any] = {"method": "quest", "token_budget": 208, "dense_layers": 1}
SHORT: dict[str, Any] = {"method": "quest", "token_budget": 48, "recent_pages": 1, "dense_layers": 1, "min_context": 190}
LAYERS, KV_HEADS, HEAD_DIM = 3, 4, 16


class Run:
    """One evaluation of two texts, its records and its examples."""

    def __init__(self, folder: Path) -> None:
        self.model = str(tiny_checkpoint(folder / "model"))
        for name in ("a", "b"):
            (folder / f"{name}.json").write_text(json.dumps(random_tokens(260, seed=ord(name))))
        suite = AgreementSuite(token_ids=(str(folder / "a.json"), str(folder / "b.json")), lengths=LENGTHS, decoded=DECODED)
        engine = {
            "device": "cpu",
            "max_model_len": 200,
            "max_num_seqs": 2,
            "kv_cache_memory_bytes": 8 << 20,
            "dtype": "float32",
        }
        # the longest window is as long as the model's context: nothing follows its last token
        config = EngineConfig(model=self.model, page_size=PAGE, **engine)  # type: ignore[arg-type]
        options = RunOptions(trace_examples=1, trace_steps=2, controls=False, batch=1)
        evaluation = Evaluation(config, suite, [QUEST, COVERS, SHORT], options)
        with Results(folder / "results", evaluation.configuration()) as results:
            evaluation.run(results)
            self.records = list(results.records.values())
        self.groups = evaluation.groups
        self.report = report(evaluation.configuration(), suite, evaluation.methods, self.records)

    def summary(self, settings: dict[str, Any], length: int) -> RunSummary:
        found = summarise_run(self.records, settings_key(settings), f"{length} tokens")
        assert found is not None
        return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("agreement"))


@pytest.mark.parametrize("length", LENGTHS)
def test_perplexity_agreement_and_divergence_are_those_of_transformers(run: Run, length: int) -> None:
    models = [
        AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32, attn_implementation=name)
        for name in ("eager", "page_method")
    ]
    nats: list[list[torch.Tensor]] = [[], []]
    kl, top1 = [], []
    for example in run.groups[f"{length} tokens"]:
        sparse = PageMethod("quest", 48, PAGE, dense_layers=1, recent_pages=1)
        dense_logits = reference_logits(models[0], example.token_ids)
        sparse_logits = reference_logits(models[1], example.token_ids, DECODED + 1, emulation=sparse)
        p, q = (logits[-DECODED - 1 : -1].double().log_softmax(-1) for logits in (dense_logits, sparse_logits))
        said = torch.tensor(example.token_ids[-DECODED:])[:, None]
        for of_model, logprobs in zip(nats, (p, q)):
            of_model.append(-logprobs.gather(1, said))
        kl.append((p.exp() * (p - q)).sum(-1))
        top1.append(p.argmax(-1) == q.argmax(-1))
    dense, quest = run.summary({"method": "dense"}, length), run.summary(QUEST, length)
    means = [float(torch.cat(of_model).mean()) for of_model in nats]
    assert [dense.score.mean, quest.score.mean] == pytest.approx(means, abs=1e-4)
    assert quest.change.mean == pytest.approx(means[1] - means[0], abs=1e-5)
    assert quest.kl.mean == pytest.approx(float(torch.cat(kl).mean()), rel=1e-2, abs=1e-6) and quest.kl.mean > 0
    assert quest.top1.mean == pytest.approx(float(torch.cat(top1).double().mean()))
    assert (quest.num_examples, quest.num_tokens, quest.compared) == (2, 2 * DECODED, 2 * DECODED)
    assert f"| dense | 2 | {2 * DECODED} | {math.exp(means[0]):.2f} [" in run.report


@pytest.mark.parametrize("length", LENGTHS)
def test_a_budget_that_covers_the_context_is_dense_in_every_bit(run: Run, length: int) -> None:
    found = run.summary(COVERS, length)
    assert (found.top1.mean, found.kl.mean, found.change.mean, found.read_share, found.sparse_share) == (
        1.0,
        0.0,
        0.0,
        1.0,
        0.0,
    )
    assert found.dense_shares == pytest.approx({"layers": 1 / 3, "short": 0.0, "whole": 2 / 3, "sparse": 0.0})


@pytest.mark.parametrize("length", LENGTHS)
def test_bytes_over_denses_are_plain_arithmetic(run: Run, length: int) -> None:
    of_token = 2 * HEAD_DIM * 4  # K and V in float32
    contexts = decode_contexts(length, DECODED + 1)
    assert contexts == list(range(length - DECODED, length + 1))
    pages = [-(-context // PAGE) for context in contexts]
    attended = [context - (count - 3) * PAGE for context, count in zip(contexts, pages)]  # 3 pages, the last one partial
    metadata = sum(pages) * of_token  # a minimum and a maximum for each page
    read = sum(contexts) * of_token + 2 * (sum(attended) * of_token + metadata)  # one dense layer, two sparse ones
    assert run.summary(QUEST, length).read_share == pytest.approx(read / (LAYERS * sum(contexts) * of_token), rel=1e-12)


def test_rows_below_min_context_are_told_apart(run: Run) -> None:
    """Contexts of 180 to 200 tokens: 10 of 21 steps are below 190."""
    found = run.summary(SHORT, 200).dense_shares
    assert found == pytest.approx({"layers": 1 / 3, "short": 2 / 3 * 10 / 21, "whole": 0.0, "sparse": 2 / 3 * 11 / 21})
    assert run.summary(SHORT, 128).dense_shares == pytest.approx({"layers": 1 / 3, "short": 2 / 3, "whole": 0.0, "sparse": 0.0})


def test_a_random_model_is_no_measure_of_methods_and_the_report_says_so(run: Run) -> None:
    """Untrained, it predicts these tokens no better than their frequencies do."""
    for length in LENGTHS:
        assert f"**agreement, {length} tokens, a: dense attention itself has perplexity" in run.report
