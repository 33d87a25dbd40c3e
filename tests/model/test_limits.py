"""How long a context a checkpoint allows, whichever way its config says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from distributed_sparse.model.config import ModelConfig
from distributed_sparse.model.limits import (
    longest_context,
    resolve_device,
    resolve_dtype,
    resolve_eos_token_ids,
    resolve_max_model_len,
)
from tests.support.checkpoints import ROPE_PARAMETERS, tiny_config
from tests.support.text_checkpoint import byte_level_bos_tokenizer


def model(folder: Path, family: str = "llama", drop: tuple[str, ...] = (), **raw: Any) -> ModelConfig:
    """A tiny model's config.json, with the fields of `raw` in it as an older or newer file would have them."""
    tiny_config(family).save_pretrained(folder)
    file = folder / "config.json"
    content = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
    file.write_text(json.dumps(content | raw))
    return ModelConfig.from_pretrained(folder)


OLD = ("rope_parameters",)
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
FACTOR = {"type": "yarn", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("family", "raw", "limit"),
    [
        ("llama", {"max_position_embeddings": 4096, "rope_theta": 1e4}, 4096),
        # Qwen2.5: the README tells to add rope_scaling, and max_position_embeddings stays as it was
        ("qwen2", {"max_position_embeddings": 32768, "rope_theta": 1e6, "rope_scaling": YARN}, 131072),
        # the same, where the file gives the stretched length: it is not stretched once more
        ("qwen2", {"max_position_embeddings": 131072, "rope_theta": 1e6, "rope_scaling": YARN}, 131072),
        # Llama 3.1: the file gives more than factor x original, and is believed
        ("llama", {"max_position_embeddings": 131072, "rope_theta": 5e5, "rope_scaling": LLAMA3}, 131072),
        ("llama", {"max_position_embeddings": 8192, "rope_theta": 5e5, "rope_scaling": LLAMA3}, 65536),
        # the original length beside rope_scaling, as Phi 3 writes it, and one within that does not count
        (
            "qwen2",
            {"max_position_embeddings": 131072, "original_max_position_embeddings": 32768, "rope_scaling": FACTOR},
            131072,
        ),
        ("llama", {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rope_scaling": YARN}, 16384),
        # Vicuna 16K: linear has no field for the original length
        ("llama", {"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        # a dynamic base follows the length itself; longrope gives the length that it was made for
        ("llama", {"max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 4096),
    ],
)
def test_the_length_is_that_after_scaling(tmp_path: Path, family: str, raw: dict[str, Any], limit: int) -> None:
    config = model(tmp_path, family, OLD, **raw)
    assert longest_context(config) == limit
    assert resolve_max_model_len(None, config) == limit
    assert resolve_max_model_len(limit, config) == limit


def test_new_rope_parameters_mean_the_same_as_old_rope_scaling(tmp_path: Path) -> None:
    parameters = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    config = model(tmp_path, "qwen2", max_position_embeddings=32768, rope_parameters=parameters)
    assert resolve_max_model_len(None, config) == 131072


def test_a_longrope_length_is_taken_as_it_stands(tmp_path: Path) -> None:
    config = model(tmp_path, max_position_embeddings=512, rope_parameters=ROPE_PARAMETERS["longrope"])
    assert resolve_max_model_len(None, config) == 512


def test_more_than_the_checkpoint_allows_is_refused_with_both_numbers(tmp_path: Path) -> None:
    raw = {"max_position_embeddings": 32768, "rope_theta": 1e6, "rope_scaling": YARN}
    config = model(tmp_path, "qwen2", OLD, **raw)
    message = (
        r"max_model_len=131073 is over the 131072 positions of the checkpoint "
        r"\(max_position_embeddings=32768, rope_type=yarn\); use at most 131072"
    )
    with pytest.raises(ValueError, match=message):
        resolve_max_model_len(131073, config)


def test_a_dynamic_base_may_be_stretched_as_far_as_the_user_likes(tmp_path: Path) -> None:
    config = model(tmp_path, "llama", OLD, max_position_embeddings=4096, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert resolve_max_model_len(100_000, config) == 100_000


def test_a_sliding_window_counts_against_the_length_that_is_used(tmp_path: Path) -> None:
    config = model(tmp_path, "mistral", sliding_window=128)
    assert resolve_max_model_len(128, config) == 128
    for max_model_len, used in ((129, 129), (None, 512)):
        with pytest.raises(ValueError, match=f"sliding_window=128 .* shorter than max_model_len={used}.*use max_model_len=128"):
            resolve_max_model_len(max_model_len, config)


def test_auto_takes_the_device_there_is_and_the_dtype_of_the_checkpoint() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_dtype("auto", torch.bfloat16) == torch.bfloat16
    assert resolve_dtype("float32", torch.bfloat16) == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="device='cuda' but this process sees no CUDA device; use device='cpu'"):
        resolve_device("cuda")


def test_the_tokenizers_eos_joins_those_of_the_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_level_bos_tokenizer()
    assert tokenizer.eos_token_id == 2
    for eos, expected in ((2, (2,)), (7, (7, 2)), ([7, 2], (7, 2)), (None, (2,))):
        assert resolve_eos_token_ids(model(tmp_path, eos_token_id=eos), tokenizer) == expected
    assert resolve_eos_token_ids(model(tmp_path, eos_token_id=7), None) == (7,)
    assert not caplog.text


def test_a_tokenizers_eos_that_the_model_cannot_write_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = byte_level_bos_tokenizer()
    tokenizer.add_tokens([f"<extra {i}>" for i in range(100)])
    tokenizer.eos_token = "<extra 99>"
    assert resolve_eos_token_ids(model(tmp_path, eos_token_id=7), tokenizer) == (7,)
    assert f"eos_token_id={tokenizer.eos_token_id} is past vocab_size=331" in caplog.text


def test_a_model_without_any_eos_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_eos_token_ids(model(tmp_path, eos_token_id=None), None) == ()
    assert caplog.text.count("names an eos_token_id") == 1
