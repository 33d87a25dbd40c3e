"""tokenizer: encode text and chat messages to token ids. `driver/detokenizer.py` decodes them."""

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
"""Arguments of transformers' `apply_chat_template` that are rejected because they would have no effect here."""


def load_tokenizer(path: str) -> "PreTrainedTokenizerFast | None":
    """Load the tokenizer of a checkpoint; None if the checkpoint has no tokenizer files.

    Args:
        path: local folder or hub id (only tokenizer files and config.json are downloaded).

    Raises:
        ValueError: the folder or hub repository does not exist, its files cannot be read, or the tokenizer has no fast
            implementation (streaming needs one).
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
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(
            f"tokenizer={path!r}: its files cannot be read ({error}); give a folder with tokenizer.json"
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"tokenizer={path!r} has no fast implementation; save it as tokenizer.json first")
    return tokenizer


def _load_tokenizer_json(folder: Path) -> "PreTrainedTokenizerFast":
    """Load tokenizer.json unchanged; special token names and the chat template come from the other files.

    AutoTokenizer would rebuild the normalizer, pre-tokenizer and decoder from `tokenizer_class` and drop those in
    tokenizer.json.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    # Pass an empty backend: transformers would add tokens that are not in tokenizer.json, and change others.
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(str(folder), tokenizer_object=Tokenizer(models.BPE()))
    _add_declared_tokens(backend, tokenizer)
    tokenizer._tokenizer = backend
    legacy_template = folder / "chat_template.json"
    if tokenizer.chat_template is None and legacy_template.is_file():
        tokenizer.chat_template = json.loads(legacy_template.read_text(encoding="utf-8"))["chat_template"]
    return tokenizer


def _add_declared_tokens(backend: "Tokenizer", tokenizer: Any) -> None:
    """Add tokens that only tokenizer_config.json, special_tokens_map.json or added_tokens.json declare, if their id is certain.

    An added token must keep its declared id; a special token must be in the vocabulary. The name of a special token without
    an id is set to None: it would otherwise map to an id that the model does not have, or to the unknown token.
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
    """Return the id that the next added token would get."""
    return max(backend.get_vocab().values(), default=-1) + 1


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(f"tokenizer={hub_id!r} is neither a local folder nor a hub id that can be read ({error})") from error


def encode_prompt(tokenizer: "PreTrainedTokenizerFast", text: str, add_special_tokens: bool = True) -> list[int]:
    """Encode a prompt without truncation; `add_special_tokens` adds the tokenizer's own special tokens (BOS)."""
    if not isinstance(text, str):
        raise ValueError(f"prompt={shown(text)} must be a str or a list of token ids")
    try:
        encoded = tokenizer(text, add_special_tokens=add_special_tokens, truncation=False, verbose=False)
    except TypeError as error:  # raised by the tokenizers library for a lone surrogate
        raise ValueError(f"prompt={shown(text)} cannot be encoded; is it valid Unicode? ({error})") from error
    return list(encoded["input_ids"])


def doubled_bos(tokenizer: "PreTrainedTokenizerFast", token_ids: Sequence[int]) -> str | None:
    """Return the BOS token if the prompt starts with it twice (in the text, and added by the tokenizer); otherwise None."""
    if len(token_ids) < 2 or token_ids[0] != token_ids[1] or token_ids[:1] != encode_prompt(tokenizer, "")[:1]:
        return None
    return str(tokenizer.convert_ids_to_tokens(token_ids[0]))


def find_chat_template(tokenizer: "PreTrainedTokenizerFast", template_args: Mapping[str, Any]) -> str:
    """Return the chat template that `apply_chat` uses with these arguments.

    Raises:
        ValueError: there is no template, or an argument would have no effect here.
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
        raise ValueError(
            f"chat_template={shown(given)} is neither a Jinja template nor the name of one of this tokenizer's templates"
        )
    return template


def apply_chat(tokenizer: "PreTrainedTokenizerFast", messages: Sequence[Mapping[str, Any]], **template_args: Any) -> list[int]:
    """Render a conversation with the chat template and encode it. The template writes BOS, so encoding adds no special tokens.

    Args:
        tokenizer: must have a chat template, unless `template_args` has one.
        messages: `{"role": str, "content": ...}` in order, oldest first. Content is a str or a list of text parts,
            `{"type": "text", "text": str}`; converted to the form that the template accepts. None is allowed in a
            message with tool calls.
        template_args: `add_generation_prompt` (default True: end with the header of the assistant's reply),
            `continue_final_message` (leave the last message open so that the model continues it), `chat_template` (a
            template, or the name of one of the tokenizer's), `chat_template_kwargs`, and the template's own variables,
            such as `tools` or `enable_thinking`.

    Raises:
        ValueError: there is no template, messages are malformed, content is not text, or the template raises an error.
    """
    template = find_chat_template(tokenizer, template_args)
    conversation = checked_messages(messages)
    options = {"add_generation_prompt": True} | template_args
    options.pop("chat_template", None)
    try:
        options |= options.pop("chat_template_kwargs", None) or {}
        text = render_conversation(template, conversation, tokenizer.special_tokens_map, **options)
    except Exception as error:  # a template is code from the checkpoint and may raise anything
        raise ValueError(f"messages: the chat template rejects them: {error}") from error
    return encode_prompt(tokenizer, text, add_special_tokens=False)


def tokenizer_json(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Serialize the tokenizer as `tokenizer.json` text, for a Detokenizer in a process without transformers."""
    return tokenizer.backend_tokenizer.to_str()
