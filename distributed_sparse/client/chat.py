"""The content of chat messages: text, or text parts, in the form that the chat template takes."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from distributed_sparse.utils.validation import shown

PROBE = ("4711036258", "8520147396")  # digits: no template changes their case
PROBE_ROLES = (("user",), ("system", "user"), ("user", "assistant", "user"))  # a template may ask for one of these orders
TEXT_PARTS = ("text", "input_text", "output_text")


def checked_messages(messages: Any) -> list[dict[str, Any]]:
    """Copies of a conversation's messages: `content` is a str, a list of texts, or absent.

    Raises:
        ValueError: no list of messages, a message without role or content, or content that is not text; names it.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise ValueError(f"messages={shown(messages)} must be a non-empty list of {{'role': ..., 'content': ...}}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"messages[{i}]={shown(message)} must be a mapping with 'role' and 'content'")
        copy = {key: value for key, value in message.items() if value is not None}  # templates test for the key alone
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
                "the model reads text alone, give {'type': 'text', 'text': ...}"
            )
        texts.append(text)
    return texts


def render_conversation(
    template: str, messages: Sequence[dict[str, Any]], special_tokens: Mapping[str, str], **options: Any
) -> str:
    """The text of messages from `checked_messages` in a chat template. Raises whatever the template raises."""
    separator = _separator(template, tuple(special_tokens.items()))

    def converted(content: str | list[str]) -> Any:
        texts = [content] if isinstance(content, str) else content
        return _parts(texts) if separator is None else separator.join(texts)

    conversation = [m | {"content": converted(m["content"])} if "content" in m else m for m in messages]
    if all("content" in message for message in messages):
        return _render(template, conversation, special_tokens, **options)
    return _render_without_content(template, conversation, converted(""), special_tokens, **options)


def _render_without_content(template: str, messages: list[dict[str, Any]], empty: Any, *args: Any, **options: Any) -> str:
    """Messages of which some have no content. Templates test for None, for a missing key, or add the content to a string:
    None goes first, since `content is none` may choose between tool calls and text, but not where its name is printed."""
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
    """What joins text parts into the string that a template takes; None: it takes no strings, only lists of parts.

    Found by rendering, since a template may reach the parts in many ways (loops, filters, macros, `content[0]`). A template
    that takes both gets a string, joined as the template itself joins parts. Others get vLLM's separator, a newline.
    """

    def rendered(roles: Sequence[str], content: Any) -> str:
        try:
            return _render(template, [{"role": role, "content": content} for role in roles], dict(special_tokens))
        except Exception:  # the template takes another form, or other roles
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
