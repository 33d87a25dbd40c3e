"""grid_workload: the requests of a point of the grid."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from distributed_sparse.protocol.client import NewRequest
from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.utils.validation import check_int, check_keys, shown

PROFILE_STEPS = 8
"""Profiled decode steps of a whole batch."""

DRAWING = ("temperature", "top_p", "top_k", "min_p")
"""Sampling parameters that a workload may set; the others follow from its lengths."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests of random tokens and equal lengths, `batch` of them in flight at a time.

    Attributes:
        input_len: tokens of each prompt.
        output_len: tokens generated per request; end-of-sequence is ignored.
        batch: requests in flight (`--max-concurrency` of `vllm bench serve`): when one ends, the next is sent.
        num_prompts: measured requests; None: two batches.
        warm_up: unmeasured requests of the same lengths and other prompts before them; None: one batch.
        seed: of prompts and draws.
        sampling: temperature, top_p, top_k, min_p; greedy by default.

    Raises:
        ValueError: an invalid value.
    """

    input_len: int
    output_len: int
    batch: int = 1
    num_prompts: int | None = None
    warm_up: int | None = None
    seed: int = 0
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, least, remedy in (
            ("input_len", 1, "give tokens per prompt"),
            ("output_len", 1, "give tokens per output"),
            ("batch", 1, "give the requests in flight"),
            ("num_prompts", 1, "give the requests to measure, or leave it out for two batches"),
            ("warm_up", 0, "give the requests before the measured ones, or leave it out for a batch"),
            ("seed", 0, "give a number below 2^31"),
        ):
            value = getattr(self, name)
            if value is not None:
                check_int(f"workload.{name}", value, least, (1 << 31) - 1, remedy=remedy)
        if not isinstance(self.sampling, Mapping):
            raise ValueError(f"workload.sampling={shown(self.sampling)} must be a mapping; write {{temperature: 0.8}}")
        check_keys(self.sampling, DRAWING, "workload.sampling")
        defaults = {"num_prompts": 2 * self.batch, "warm_up": self.batch}
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self.params(0)

    @classmethod
    def from_dict(cls, given: Mapping[str, Any], where: str) -> Workload:
        """A Workload from the keys in `given`; `where` names their origin in errors."""
        check_keys(given, [f.name for f in fields(cls)], where)
        for name in ("input_len", "output_len"):
            if name not in given:
                raise ValueError(f"{where}: key {name!r} is missing, and no axis of the grid gives it")
        return cls(**given)

    def params(self, number: int) -> SamplingParams:
        """Parameters of a request, with its own seed, so that draws do not depend on other requests."""
        given = {"temperature": 0.0, **self.sampling, "seed": (self.seed << 32) + number}
        return SamplingParams.from_dict({**given, "max_tokens": self.output_len, "ignore_eos": True})

    def requests(self, first: int, count: int, vocab_size: int) -> list[NewRequest]:
        """Requests `first` .. `first + count - 1`; points of equal lengths have the same prompts."""
        return [self._request(i, self.input_len, vocab_size, self.params(i)) for i in range(first, first + count)]

    def profiled_batch(self, first: int, vocab_size: int, max_num_batched_tokens: int) -> list[NewRequest]:
        """A batch whose last request profiles the parts of its steps, while all other requests decode.

        Its contexts are those in the middle of the workload. Empty if outputs are too short for a decode step.

        Args:
            first: number of the first request.
            max_num_batched_tokens: of the engine, which determines the number of prefill steps.
        """
        if self.output_len < 2:
            return []
        reading = -(-self.batch * self.input_len // max(max_num_batched_tokens - self.batch, 1))
        outputs = min(self.output_len, reading + PROFILE_STEPS + 1)
        input_len = self.input_len + (self.output_len - outputs) // 2
        found = []
        for number in range(first, first + self.batch):
            is_last = number == first + self.batch - 1
            max_tokens = min(outputs, PROFILE_STEPS + 1) if is_last else outputs
            params = replace(self.params(number), max_tokens=max_tokens)
            found.append(self._request(number, input_len, vocab_size, params, profile=is_last))
        return found

    def _request(
        self, number: int, input_len: int, vocab_size: int, params: SamplingParams, profile: bool = False
    ) -> NewRequest:
        tokens = np.random.default_rng([self.seed, number]).integers(0, vocab_size, input_len)
        return NewRequest(f"{number}-{uuid.uuid4().hex[:8]}", tokens.tolist(), params, profile=profile)
