"""Messages reach the model as the chat template means them, whichever form of content the template and the caller use."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from distributed_sparse.client.tokenizer import apply_chat, doubled_bos, encode_prompt
from tests.support.text_checkpoint import byte_level_bos_tokenizer

STRING_TEMPLATES = {
    "plain": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}",
    "joined": "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '\n' }}{% endfor %}",
    "trimmed": "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}\n{% endfor %}",
    "system first": "{% if messages[0].role == 'system' %}[system]{{ messages[0].content }}\n"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}",
    "system needed": "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}",
}
PART_TEMPLATES = {
    "loop": "{% for m in messages %}[{{ m.role }}]{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    "{% endif %}{% endfor %}{{ '\n' }}{% endfor %}",
    "filter": "{% for m in messages %}[{{ m.role }}]{% for c in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ c['text'] }}{% endfor %}{{ '\n' }}{% endfor %}",
    "set": "{% for m in messages %}[{{ m.role }}]{% set content = m.content %}{% for c in content %}{{ c.text }}{% endfor %}"
    "{{ '\n' }}{% endfor %}",
    "macro": "{% macro show(content) %}{% for c in content %}{{ c.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}[{{ m.role }}]{{ show(m.content) }}\n{% endfor %}",
    "joined": "{% for m in messages %}[{{ m.role }}]{{ m.content | map(attribute='text') | join }}\n{% endfor %}",
}
BOTH = {
    "is string": "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ c.text }}{% endfor %}{% endif %}{{ '\n' }}{% endfor %}",
    "first part of system": "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}"
    "{% elif m.role == 'system' %}{{ m.content[0].text }}{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}"
    "{% endif %}{{ '\n' }}{% endfor %}",
}
TEMPLATES = STRING_TEMPLATES | {f"parts: {name}": template for name, template in (PART_TEMPLATES | BOTH).items()}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "fox", "arguments": {}}}]}


def with_template(template: str) -> PreTrainedTokenizerFast:
    return byte_level_bos_tokenizer(template)


def text_of(template: str, messages: Any, **options: Any) -> str:
    """The prompt's text, without BOS."""
    tokenizer = with_template(template)
    return str(tokenizer.decode(apply_chat(tokenizer, messages, **options))).removeprefix("<s>")


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def chat(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in zip(("system", "user", "assistant", "user"), contents)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_and_parts_give_the_same_prompt_in_every_template(name: str) -> None:
    wanted = "[system]the fox\n[user]the dog\n[assistant]again\n[user]and\n"
    for contents in (
        ("the fox", "the dog", "again", "and"),
        (parts("the fox"), parts("the dog"), parts("again"), parts("and")),
        ("the fox", parts("the dog"), ["again"], [{"type": "input_text", "text": "and"}]),
    ):
        assert text_of(TEMPLATES[name], chat(*contents)) == wanted


@pytest.mark.parametrize("name", TEMPLATES)
def test_several_parts_are_lines_for_a_string_template_and_what_the_template_makes_of_them_else(name: str) -> None:
    separator = "\n" if name in STRING_TEMPLATES else ""
    messages = chat(parts("the", "fox"), parts("dog", "cat"))
    assert text_of(TEMPLATES[name], messages) == f"[system]the{separator}fox\n[user]dog{separator}cat\n"


def test_messages_of_the_caller_stay_as_they_are() -> None:
    messages = chat("the fox", parts("dog", "cat"))
    for template in TEMPLATES.values():
        text_of(template, messages)
    assert messages == chat("the fox", parts("dog", "cat"))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if "needed" not in name])
def test_the_last_message_goes_on_in_either_form(name: str) -> None:
    messages = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "jumps"}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert text_of(TEMPLATES[name], messages, **options) == "[user]the fox\n[assistant]jumps"


@pytest.mark.parametrize("name", [name for name in TEMPLATES if "needed" not in name])
def test_a_message_without_content_beside_tool_calls_is_empty(name: str) -> None:
    messages = [{"role": "user", "content": "the fox"}, CALL, {"role": "tool", "content": "over"}]
    for call in (CALL, {key: value for key, value in CALL.items() if key != "content"}):
        assert text_of(TEMPLATES[name], [messages[0], call, messages[2]]) == "[user]the fox\n[assistant]\n[tool]over\n"


def test_a_template_that_tests_for_no_content_sees_that_there_is_none() -> None:
    # As the templates of DeepSeek-R1 do. transformers removes the key, and an undefined value is not none.
    template = (
        "{% for m in messages %}{% if m['content'] is none %}[call]{{ m.tool_calls[0].function.name }}"
        "{% else %}{{ '[' + m.role + ']' + m['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    assert text_of(template, [{"role": "user", "content": "None of it"}, CALL]) == "[user]None of it\n[call]fox\n"


def test_keys_that_are_none_are_left_out_as_transformers_leaves_them_out() -> None:
    template = "{% for m in messages %}{% if 'tool_calls' in m %}[call]{% else %}{{ m.content }}{% endif %}{% endfor %}"
    assert text_of(template, [{"role": "assistant", "content": "the fox", "tool_calls": None}]) == "the fox"


@pytest.mark.parametrize("name", ["plain", "parts: loop"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], r"messages\[0\]: content part .* of type 'image_url' is not supp"),
        ([*parts("a"), {"type": "input_audio", "input_audio": {}}], "of type 'input_audio' is not supported"),
        ([{"type": "nonsense", "text": "a"}], "of type 'nonsense' is not supported; only text is supported"),
        ([{"text": "a"}], r"content part \{'text': 'a'\} of type None"),
        ([{"type": "text"}], "of type 'text' is not supported"),
        ([{"type": "text", "text": 3}], "of type 'text' is not supported"),
        ([3], "content part 3 of type None"),
        (3, r"messages\[0\]: content=3 must be a str or a list of"),
        ({"type": "text", "text": "a"}, "must be a str or a list of"),
        (None, "has no 'content'; add it"),
    ],
)
def test_content_that_is_no_text_is_refused_by_name(name: str, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        text_of(TEMPLATES[name], [{"role": "user", "content": content}])


def test_arguments_of_a_call_reach_the_template_or_are_refused() -> None:
    template = "{% if enable_thinking %}yes{% else %}no{% endif %}{{ messages[0].content }}"
    messages = [{"role": "user", "content": "!"}]
    assert text_of(template, messages, chat_template_kwargs={"enable_thinking": True}) == "yes!"
    assert text_of("other", messages, chat_template=template) == "no!"
    with pytest.raises(ValueError, match="tokenize=False: chat does not take tokenize; remove it"):
        text_of(template, messages, tokenize=False)
    with pytest.raises(ValueError, match="continue_final_message=True needs add_generation_prompt=False"):
        text_of(template, messages, continue_final_message=True)
    with pytest.raises(ValueError, match="chat_template='tool_us' is neither a Jinja template nor the name of one"):
        text_of(template, messages, chat_template="tool_us")


def test_one_of_several_templates_is_taken_by_its_name() -> None:
    tokenizer = byte_level_bos_tokenizer()
    tokenizer.chat_template = {"default": STRING_TEMPLATES["plain"], "tool_use": "tools: " + PART_TEMPLATES["loop"]}
    messages = [{"role": "user", "content": "the fox"}]
    tools = [{"type": "function", "function": {"name": "dog", "description": "", "parameters": {}}}]
    for options, wanted in (({}, "<s>[user]the fox\n"), ({"tools": tools}, "tools: [user]the fox\n")):
        assert tokenizer.decode(apply_chat(tokenizer, messages, **options)) == wanted
    assert tokenizer.decode(apply_chat(tokenizer, messages, chat_template="tool_use")) == "tools: [user]the fox\n"


def test_a_text_that_begins_with_the_bos_that_the_tokenizer_adds_has_two() -> None:
    tokenizer = byte_level_bos_tokenizer()
    assert doubled_bos(tokenizer, encode_prompt(tokenizer, "<s>the fox")) == "<s>"
    for text in ("the fox", "the <s><s>", "</s></s>", ""):
        assert doubled_bos(tokenizer, encode_prompt(tokenizer, text)) is None
    assert doubled_bos(tokenizer, apply_chat(tokenizer, [{"role": "user", "content": "x"}])) is None
    tokenizer.backend_tokenizer.post_processor = None
    assert doubled_bos(tokenizer, encode_prompt(tokenizer, "<s><s>the fox")) is None
