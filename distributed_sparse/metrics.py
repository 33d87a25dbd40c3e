"""metrics: RequestMetrics, the timestamps and token counts of one request."""

from dataclasses import dataclass


@dataclass
class RequestMetrics:
    """Timestamps in seconds of the Driver's `time.monotonic()`. Only differences are meaningful.

    A timestamp is None until its event has happened; a property is None while it depends on such a timestamp.

    Attributes:
        arrival_time: when the request was accepted.
        first_scheduled_time: when its first prompt chunk was scheduled.
        first_token_time: when its first token was committed.
        finished_time: when its last token was committed, or when it was aborted or failed.
        num_prompt_tokens: tokens of the prompt.
        num_output_tokens: tokens of the longest completion.
        num_replayed_tokens: tokens recomputed after a shard was lost.
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
        """Seconds from arrival to the first scheduled prompt chunk."""
        return _between(self.arrival_time, self.first_scheduled_time)

    @property
    def ttft(self) -> float | None:
        """Time to first token, seconds from arrival."""
        return _between(self.arrival_time, self.first_token_time)

    @property
    def prefill_time(self) -> float | None:
        """Seconds from the first scheduled prompt chunk to the first token."""
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
        """Time per output token after the first, in seconds; None with fewer than two tokens."""
        decode_time = self.decode_time
        return None if decode_time is None or self.num_output_tokens < 2 else decode_time / (self.num_output_tokens - 1)


def _between(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else end - start
