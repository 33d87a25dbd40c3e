"""The client's tokenizer: text and chat messages to token ids. Back to text is `driver/detokenizer.py`."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed_sparse.validation import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_DOWNLOADED = ("config.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "tekken.json", "special_tokens_map.json",
               "added_tokens.json", "chat_template*")  # fmt: skip


def load_tokenizer(path: str) -> "PreTrainedTokenizerFast | None":
    """The tokenizer of a checkpoint, or None when the checkpoint has no tokenizer files.

    Args:
        path: local folder or hub id (only the tokenizer's files are fetched).

    Raises:
        ValueError: when there is neither such a folder nor such a hub repository, when its files cannot be read, or when
            it has no fast implementation (streaming needs one).
    """
    from transformers import AutoTokenizer

    local = Path(os.path.expanduser(path))
    folder = local if local.is_dir() else _download(path)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(
            f"tokenizer={path!r}: its files cannot be read ({error}); give a folder with tokenizer.json"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer={path!r} has no fast implementation; save it as tokenizer.json first")
    return tokenizer


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"tokenizer={hub_id!r} is neither a local folder nor a hub id that can be read ({error})") from error


def encode_prompt(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Token ids of a prompt, with the special tokens (BOS) that the tokenizer adds by itself; never truncated."""
    if not isinstance(text, str):
        raise ValueError(f"prompt={shown(text)} must be a str or a list of token ids")
    try:
        return list(tokenizer(text, truncation=False, verbose=False)["input_ids"])
    except TypeError as error:  # what the tokenizers library says of a lone surrogate
        raise ValueError(f"prompt={shown(text)} cannot be encoded; is it valid Unicode? ({error})") from error


def apply_chat(
    tokenizer: "PreTrainedTokenizerFast",
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    **template_kwargs: Any,
) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, which writes BOS itself: none is added to it.

    Args:
        tokenizer: one that has a chat template.
        messages: `{"role": str, "content": ...}` in order, oldest first.
        add_generation_prompt: end with the header of the assistant's answer.
        continue_final_message: leave the last message open, for the model to go on with it.
        template_kwargs: what the template understands besides, such as `tools` or `enable_thinking`.

    Raises:
        ValueError: without a template, for malformed messages, or when the template itself refuses them.
    """
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("messages: this tokenizer has no chat template; give a text prompt, or another tokenizer=")
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages={shown(messages)} must be a non-empty list of {{'role': ..., 'content': ...}}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}]={shown(message)} must be a mapping with 'role' and 'content'")
        if "content" not in message and "tool_calls" not in message:
            raise ValueError(f"messages[{i}]={shown(message)} has no 'content'; add it")
    if continue_final_message and add_generation_prompt:
        raise ValueError("continue_final_message=True needs add_generation_prompt=False")
    try:
        token_ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=True,
            return_dict=False,
            **template_kwargs,
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"messages: the chat template refuses them: {error}") from error
    return list(token_ids)


def tokenizer_json(tokenizer: "PreTrainedTokenizerFast") -> str:
    """The tokenizer as `tokenizer.json` text, for a Detokenizer in a process without transformers."""
    return tokenizer.backend_tokenizer.to_str()
