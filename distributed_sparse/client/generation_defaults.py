"""generation_defaults: read default sampling parameters from a checkpoint's generation_config.json."""

import json
import logging
from pathlib import Path
from typing import Any

from distributed_sparse.sampling_params import SamplingParams
from distributed_sparse.utils.validation import shown

logger = logging.getLogger(__name__)

_TAKEN = {name: name for name in ("temperature", "top_k", "top_p", "min_p")} | {"max_new_tokens": "max_tokens"}

_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "do_sample": (True,),
    "num_beams": (1,),
    "typical_p": (1.0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), (1.0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"), (0,)),
    **dict.fromkeys(
        (
            "penalty_alpha", "top_h", "guidance_scale", "sequence_bias", "bad_words_ids", "force_words_ids", "constraints",
            "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "stop_strings",
            "exponential_decay_length_penalty", "watermarking_config", "dola_layers",
        ),
        (),
    ),
}  # fmt: skip
"""Unsupported key of transformers' GenerationConfig that changes which tokens are generated -> its neutral values."""


def default_sampling_params(checkpoint: Path) -> SamplingParams:
    """Return the SamplingParams that `LLM.generate` uses when none are given, as in vLLM.

    Reads temperature, top_k, top_p, min_p and max_new_tokens from generation_config.json. Logs a warning that names other
    keys that would change the output.

    Args:
        checkpoint: the model's local folder.

    Raises:
        ValueError: generation_config.json is malformed or has an invalid value; names the file, key and value.
    """
    file = checkpoint / "generation_config.json"
    if not file.is_file():
        return SamplingParams()
    try:
        given = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}; fix it, or give SamplingParams") from error
    if not isinstance(given, dict):
        raise ValueError(f"{file} holds {shown(given)}, not an object; fix it, or give SamplingParams")
    ignored = [
        f"{name}={shown(given[name])}"
        for name, neutral in _NOT_APPLIED.items()
        if given.get(name) is not None and given[name] != [] and given[name] not in neutral
    ]
    if ignored:
        logger.warning(
            "%s: %s is not applied; only %s are supported. Give SamplingParams to override the file (temperature=0 is greedy).",
            file, ", ".join(ignored), ", ".join(_TAKEN),
        )  # fmt: skip
    try:
        return SamplingParams(**{_TAKEN[name]: given[name] for name in _TAKEN if given.get(name) is not None})
    except ValueError as error:
        raise ValueError(f"{file}: {error} (or give SamplingParams)") from error
