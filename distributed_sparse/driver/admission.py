"""Admission: checks a client's NewRequest and turns it into the Driver's Request."""

from __future__ import annotations

from distributed_sparse.config import EngineConfig
from distributed_sparse.driver.detokenizer import Detokenizer
from distributed_sparse.driver.request_validation import validate_request
from distributed_sparse.driver.requests import Request
from distributed_sparse.metrics import RequestMetrics
from distributed_sparse.protocol.client import ModelInfo, NewRequest


class Admission:
    """Checks requests against one engine's configuration. Stateless.

    Args:
        detokenizer: None if the model has no tokenizer; outputs then have no text.
    """

    def __init__(self, config: EngineConfig, model: ModelInfo, detokenizer: Detokenizer | None) -> None:
        self._config = config
        self._model = model
        self._detokenizer = detokenizer

    def new_request(self, client_id: str, new: NewRequest, now: float, number: int) -> Request:
        """Check a request and make the Driver's Request.

        Args:
            now: arrival time (`time.monotonic`).
            number: number of requests admitted before; a request without a seed gets one derived from it.

        Raises:
            ValueError: a parameter is invalid; names it and the remedy.
        """
        params = validate_request(
            new.prompt_token_ids,
            new.params,
            vocab_size=self._model.vocab_size,
            max_model_len=self._model.max_model_len,
            max_num_seqs=self._config.max_num_seqs,
            has_tokenizer=self._detokenizer is not None,
            traces=self._config.trace,
            score=new.score,
        )
        room = self._model.max_model_len - len(new.prompt_token_ids)
        stop_token_ids = frozenset(params.stop_token_ids)
        if not params.ignore_eos:
            stop_token_ids |= frozenset(self._model.eos_token_ids)
        if params.min_tokens > 0 and len(stop_token_ids) >= self._model.vocab_size:
            raise ValueError(
                f"min_tokens={params.min_tokens} excludes stop_token_ids and EOS, which are all "
                f"{self._model.vocab_size} tokens of the vocabulary; use min_tokens=0, or name fewer stop_token_ids"
            )
        request = Request(
            request_id=new.request_id,
            client_id=client_id,
            prompt_token_ids=new.prompt_token_ids,
            params=params,
            seed=params.seed if params.seed is not None else derived_seed(self._config.seed, number),
            max_tokens=0 if new.score else params.max_tokens if params.max_tokens is not None else room,
            metrics=RequestMetrics(arrival_time=now, num_prompt_tokens=len(new.prompt_token_ids)),
            stop_token_ids=stop_token_ids,
            deadline=now + params.timeout_s if params.timeout_s is not None else None,
            first_scored=new.first_scored,
            profile=new.profile,
        )
        if self._detokenizer is not None and not request.score:
            for sequence in request.sequences:
                sequence.text = self._detokenizer.new_completion(
                    request.prompt_token_ids, params.stop, params.include_stop_str_in_output, params.min_tokens
                )
        return request


def derived_seed(engine_seed: int, arrival: int) -> int:
    """Derive the seed of a request without one from the engine's seed and the arrival number (splitmix64's mixing)."""
    z = (engine_seed * 0x9E3779B97F4A7C15 + (arrival + 1) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) >> 1  # 63 bits: fits an int64
