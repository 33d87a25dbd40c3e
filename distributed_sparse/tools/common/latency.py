"""latency: TTFT, TPOT and ITL from the arrival times of tokens, defined as in `vllm bench serve`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class RequestTimes:
    """One request as seen by its client; times are seconds of `time.monotonic()` in one process.

    Attributes:
        sent: time just before submission.
        arrivals: time of each update with tokens (one update per token, unless updates were late).
        token_ids: all output tokens.
        num_prompt_tokens: tokens of its prompt.
    """

    sent: float
    num_prompt_tokens: int
    arrivals: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)

    @property
    def ttft(self) -> float:
        """Time to first token: from `sent` to the first token."""
        return self.arrivals[0] - self.sent

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None with fewer than two tokens."""
        count = len(self.token_ids)
        return (self.arrivals[-1] - self.arrivals[0]) / (count - 1) if count > 1 else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the gaps between arrivals."""
        return [later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:])]


def latencies(requests: Sequence[RequestTimes]) -> dict[str, Any]:
    """Latencies and throughput over all requests.

    Returns:
        "ttft_ms", "tpot_ms" (over requests) and "itl_ms" (over all gaps), each {"mean", "median", "p99"}, or None without
        values; "duration_s" from the first request sent to the last token; "requests_per_s", "output_tokens_per_s",
        "total_tokens_per_s" (prompts included).
    """
    duration = max(request.arrivals[-1] for request in requests) - min(request.sent for request in requests)
    num_output = sum(len(request.token_ids) for request in requests)
    num_prompt = sum(request.num_prompt_tokens for request in requests)
    return {
        "ttft_ms": spread_ms([request.ttft for request in requests]),
        "tpot_ms": spread_ms([tpot for request in requests if (tpot := request.tpot) is not None]),
        "itl_ms": spread_ms([gap for request in requests for gap in request.itl]),
        "duration_s": duration,
        "requests_per_s": len(requests) / duration,
        "output_tokens_per_s": num_output / duration,
        "total_tokens_per_s": (num_output + num_prompt) / duration,
    }


def spread_ms(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean, median and 99th percentile (numpy's linear interpolation) in ms; None without values."""
    if not seconds:
        return None
    ms = np.asarray(seconds) * 1e3
    return {"mean": float(ms.mean()), "median": float(np.median(ms)), "p99": float(np.percentile(ms, 99))}
