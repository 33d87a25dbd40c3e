"""chat: check chat messages and render them, with content in the form (str or text parts) that the chat template accepts."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from distributed_sparse.utils.validation import shown

PROBE = ("4711036258", "8520147396")  # digits: no template changes their case
PROBE_ROLES = (("user",), ("system", "user"), ("user", "assistant", "user"))  # a template may require one of these orders
TEXT_PARTS = ("text", "input_text", "output_text")


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Return checked copies of the messages; `content` is a str, a list of texts, or absent.

    Raises:
        ValueError: not a list of messages, a message without role or content, or content that is not text; names the message.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages={shown(messages)} must be a non-empty list of {{'role': ..., 'content': ...}}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}]={shown(message)} must be a mapping with 'role' and 'content'")
        # Drop None values: templates test whether a key exists, not its value.
        copy = {key: value for key, value in message.items() if value is not None}
        content = copy.pop("content", None)
        if content is not None:
            copy["content"] = _checked_content(content, f"messages[{i}]")
        elif not any(value for key, value in copy.items() if key not in ("role", "name")):
            raise ValueError(f"messages[{i}]={shown(message)} has no 'content'; add it")
        checked.append(copy)
    return checked


def _checked_content(content: Any, where: str) -> str | list[str]:
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{where}: content={shown(content)} must be a str or a list of {{'type': 'text', 'text': ...}}")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text") if isinstance(part, Mapping) and kind in TEXT_PARTS else part
        if not isinstance(text, str):
            raise ValueError(
                f"{where}: content part {shown(part)} of type {kind!r} is not supported; "
                "only text is supported; give {'type': 'text', 'text': ...}"
            )
        texts.append(text)
    return texts


def render_conversation(
    template: str, messages: Sequence[dict[str, Any]], special_tokens: Mapping[str, str], **options: Any
) -> str:
    """Render messages from `checked_messages` with a chat template. Raises whatever the template raises."""
    separator = _separator(template, tuple(special_tokens.items()))

    def converted(content: str | list[str]) -> Any:
        texts = [content] if isinstance(content, str) else content
        return _parts(texts) if separator is None else separator.join(texts)

    conversation = [m | {"content": converted(m["content"])} if "content" in m else m for m in messages]
    if all("content" in message for message in messages):
        return _render(template, conversation, special_tokens, **options)
    return _render_without_content(template, conversation, converted(""), special_tokens, **options)


def _render_without_content(template: str, messages: list[dict[str, Any]], empty: Any, *args: Any, **options: Any) -> str:
    """Render messages, some of which have no content, with content None, absent, or empty.

    Templates test for None, test for the key, or concatenate the content. None is tried first, because `content is none` may
    choose between tool calls and text; the rendering with the fewest occurrences of the text "None" is returned.
    """
    texts: list[str] = []
    for default in ({"content": None}, {}, {"content": empty}):
        try:
            texts.append(_render(template, [default | message for message in messages], *args, **options))
        except Exception as error:
            failure = error
        else:
            if default != {"content": None}:
                break
    if not texts:
        raise failure
    return min(texts, key=lambda text: text.count("None"))


@lru_cache(maxsize=32)
def _separator(template: str, special_tokens: tuple[tuple[str, str], ...]) -> str | None:
    """Return the separator that joins text parts into one string; None if the template accepts only lists of parts.

    Determined by rendering probes, because a template may access parts in many ways (loops, filters, macros, `content[0]`).
    A template that accepts both forms gets a string, joined with "" if the template itself concatenates parts without a
    separator. All others get vLLM's separator, a newline.
    """

    def rendered(roles: Sequence[str], content: Any) -> str:
        try:
            return _render(template, [{"role": role, "content": content} for role in roles], dict(special_tokens))
        except Exception:  # the template requires another form or other roles
            return ""

    for roles in PROBE_ROLES:
        of_parts = rendered(roles, _parts(PROBE))
        if PROBE[0] in rendered(roles, PROBE[0]):
            return "" if of_parts == rendered(roles, "".join(PROBE)) else "\n"
        if all(text in of_parts for text in PROBE):
            return None
    return "\n"


def _parts(texts: Sequence[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _render(template: str, messages: list[dict[str, Any]], special_tokens: Mapping[str, str], **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {**special_tokens, **options}
    return render_jinja_template([messages], chat_template=template, **options)[0][0]
