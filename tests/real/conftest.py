"""SmolLM2-135M-Instruct, converted once to checkpoints/smollm2-135m; in the engine and in transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from distributed_sparse import LLM
from distributed_sparse.tools.evaluation.real_model import ensure_real_checkpoint
from tests.support.engine import make_llm

ROOT = Path(__file__).resolve().parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    folder = ROOT / "checkpoints" / "smollm2-135m"
    ensure_real_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def reference(checkpoint: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="session")
def dense(checkpoint: Path) -> Iterator[LLM]:
    """One rank."""
    with make_llm(checkpoint, max_num_seqs=8) as llm:
        yield llm
