"""The client's tokenizer: text and chat messages to token ids. Back to text is `driver/detokenizer.py`."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distributed_sparse.client.chat import checked_messages, render_conversation
from distributed_sparse.utils.validation import shown

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json")
_DOWNLOADED = ("config.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "tekken.json", "special_tokens_map.json",
               "added_tokens.json", "chat_template*", "additional_chat_templates/*")  # fmt: skip

TOKENIZER_ARGS = ("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
                  "return_assistant_tokens_mask", "sanitize_control_tokens", "tokenizer_kwargs")  # fmt: skip
"""Arguments of transformers' `apply_chat_template` that have no effect on a prompt here."""


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
        if (folder / "tokenizer.json").is_file():
            return _load_tokenizer_json(folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), use_fast=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(
            f"tokenizer={path!r}: its files cannot be read ({error}); give a folder with tokenizer.json"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer={path!r} has no fast implementation; save it as tokenizer.json first")
    return tokenizer


def _load_tokenizer_json(folder: Path) -> "PreTrainedTokenizerFast":
    """tokenizer.json as it stands, with the special tokens' names and the chat template of the other files.

    AutoTokenizer would rebuild normalizer, pre-tokenizer and decoder from `tokenizer_class` and drop those of tokenizer.json.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    # transformers gets an empty backend: it would add tokens to it that tokenizer.json does not have, and change others.
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(folder), tokenizer_object=Tokenizer(models.BPE()))
    _add_declared_tokens(backend, tokenizer)
    tokenizer._tokenizer = backend
    legacy_template = folder / "chat_template.json"
    if tokenizer.chat_template is None and legacy_template.is_file():
        tokenizer.chat_template = json.loads(legacy_template.read_text(encoding="utf-8"))["chat_template"]
    return tokenizer


def _add_declared_tokens(backend: "Tokenizer", tokenizer: Any) -> None:
    """Add what only tokenizer_config.json, special_tokens_map.json or added_tokens.json declare, where its id is certain.

    An added token needs the id that it is declared with, a special token one in the vocabulary. A special token without an id
    loses its name: it would become an id that the model does not have, or the unknown token's.
    """
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for token_id, token in sorted(tokenizer.init_kwargs["added_tokens_decoder"].items()):
        own_id = backend.token_to_id(token.content)
        if token.content not in known and (token_id == own_id or (own_id is None and token_id == _next_id(backend))):
            backend.add_tokens([token])
            known.add(token.content)
    for content in {*tokenizer.special_tokens_map.values(), *tokenizer.extra_special_tokens} - known:
        if backend.token_to_id(content) is not None:
            backend.add_special_tokens([content])
    for name, content in tokenizer.special_tokens_map.items():
        if backend.token_to_id(content) is None:
            setattr(tokenizer, name, None)


def _next_id(backend: "Tokenizer") -> int:
    """The id that a new token would get."""
    return max(backend.get_vocab().values(), default=-1) + 1


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"tokenizer={hub_id!r} is neither a local folder nor a hub id that can be read ({error})") from error


def encode_prompt(tokenizer: "PreTrainedTokenizerFast", text: str, add_special_tokens: bool = True) -> list[int]:
    """Token ids of a prompt, with the special tokens (BOS) that the tokenizer adds by itself; never truncated."""
    if not isinstance(text, str):
        raise ValueError(f"prompt={shown(text)} must be a str or a list of token ids")
    try:
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, truncation=False, verbose=False)
    except TypeError as error:  # what the tokenizers library says of a lone surrogate
        raise ValueError(f"prompt={shown(text)} cannot be encoded; is it valid Unicode? ({error})") from error
    return list(encoded["input_ids"])


def doubled_bos(tokenizer: "PreTrainedTokenizerFast", token_ids: Sequence[int]) -> str | None:
    """The token that begins an encoded prompt twice, since the text has it and the tokenizer adds it; None: no such token."""
    if len(token_ids) < 2 or token_ids[0] != token_ids[1] or token_ids[:1] != encode_prompt(tokenizer, "")[:1]:
        return None
    return str(tokenizer.convert_ids_to_tokens(token_ids[0]))


def find_chat_template(tokenizer: "PreTrainedTokenizerFast", template_args: Mapping[str, Any]) -> str:
    """The chat template that a call of `apply_chat` with these arguments takes.

    Raises:
        ValueError: there is none, or an argument has no effect here.
    """
    for name in TOKENIZER_ARGS:
        if name in template_args:
            raise ValueError(f"{name}={shown(template_args[name])}: chat does not take {name}; remove it")
    if not (tokenizer.chat_template or template_args.get("chat_template")):
        raise ValueError("messages: this tokenizer has no chat template; give a text prompt, or another tokenizer=")
    if template_args.get("continue_final_message") and template_args.get("add_generation_prompt", True):
        raise ValueError("continue_final_message=True needs add_generation_prompt=False")
    given = template_args.get("chat_template")
    template = tokenizer.get_chat_template(given, template_args.get("tools"))
    if template == given and "{" not in template:
        raise ValueError(f"chat_template={shown(given)} is neither a Jinja template nor the name of one of this tokenizer's")
    return template


def apply_chat(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Mapping[str, Any]], **template_args: Any) -> list[int]:
    """Token ids of a conversation in the tokenizer's chat template, which writes BOS itself: none is added to it.

    Args:
        tokenizer: one that has a chat template.
        messages: `{"role": str, "content": ...}` in order, oldest first. Content is a str or a list of text parts,
            `{"type": "text", "text": str}`, whichever of the two the template takes; None in a message with tool calls.
        template_args: `add_generation_prompt` (True: end with the header of the assistant's answer),
            `continue_final_message` (leave the last message open, for the model to go on with it), `chat_template` (the
            name of one of several, or a template), `chat_template_kwargs`, and what the template understands besides,
            such as `tools` or `enable_thinking`.

    Raises:
        ValueError: without a template, for malformed messages or content that is not text, or when the template itself
            refuses them.
    """
    template = find_chat_template(tokenizer, template_args)
    conversation = checked_messages(messages)
    options = {"add_generation_prompt": True} | template_args
    options.pop("chat_template", None)
    try:
        options |= options.pop("chat_template_kwargs", None) or {}
        text = render_conversation(template, conversation, tokenizer.special_tokens_map, **options)
    except Exception as error:  # a template is a program of the checkpoint: it may fail in any way
        raise ValueError(f"messages: the chat template refuses them: {error}") from error
    return encode_prompt(tokenizer, text, add_special_tokens=False)


def tokenizer_json(tokenizer: "PreTrainedTokenizerFast") -> str:
    """The tokenizer as `tokenizer.json` text, for a Detokenizer in a process without transformers."""
    return tokenizer.backend_tokenizer.to_str()
