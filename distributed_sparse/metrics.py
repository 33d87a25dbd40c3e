"""RequestMetrics: when the things of a request's life happened, on one monotonic clock."""

from dataclasses import dataclass


@dataclass
class RequestMetrics:
    """Times in seconds of the Driver's `time.monotonic()`: differences mean something, absolute values do not.

    The Driver fills one field after the other; what has not happened yet is None, and so is what depends on it.

    Attributes:
        arrival_time: the request was accepted.
        first_scheduled_time: its first prefill chunk was put into a step.
        first_token_time: its first token was committed.
        finished_time: its last token was committed, or it was aborted or failed.
        num_prompt_tokens: tokens of the prompt.
        num_output_tokens: tokens of the longest completion, which gets one token per step.
        num_replayed_tokens: tokens computed a second time after a shard was lost.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_replayed_tokens: int = 0

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival to the first scheduled chunk."""
        return _between(self.arrival_time, self.first_scheduled_time)

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds from arrival."""
        return _between(self.arrival_time, self.first_token_time)

    @property
    def prefill_time(self) -> float | None:
        """Seconds from the first scheduled chunk to the first token."""
        return _between(self.first_scheduled_time, self.first_token_time)

    @property
    def decode_time(self) -> float | None:
        """Seconds from the first token to the end."""
        return _between(self.first_token_time, self.finished_time)

    @property
    def latency(self) -> float | None:
        """Seconds from arrival to the end."""
        return _between(self.arrival_time, self.finished_time)

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, seconds; with fewer than two tokens there is none."""
        decode_time = self.decode_time
        return None if decode_time is None or self.num_output_tokens < 2 else decode_time / (self.num_output_tokens - 1)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
