"""A launcher that is told to end unwinds, so that its engine is shut down; and gives the signal back."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from distributed_sparse.commands.lifetime import TERMINATED, ends_on_sigterm, one_ray
from distributed_sparse.config import EngineConfig


def test_sigterm_unwinds_with_its_own_exit_code_and_the_handler_of_before_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    unwound = []
    with pytest.raises(SystemExit) as ended, ends_on_sigterm():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            unwound.append(True)
    assert ended.value.code == TERMINATED == 143 and unwound
    assert signal.getsignal(signal.SIGTERM) == before


def test_engines_of_one_rank_in_this_process_start_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed_sparse.ray_backend.session", None)  # importing it would fail
    alone = EngineConfig(model="m")
    with one_ray(alone, EngineConfig(model="m", distributed_executor_backend="uni")):
        pass
    with pytest.raises(ImportError), one_ray(alone, EngineConfig(model="m", tensor_parallel_size=2)):
        pass
