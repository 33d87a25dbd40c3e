"""Text and messages become the token ids that the checkpoint's own tokenizer means: one BOS, no truncation."""

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from distributed_sparse.client.tokenizer import apply_chat, encode_prompt, load_tokenizer, tokenizer_json
from distributed_sparse.driver.detokenizer import Detokenizer
from tests.support.text_checkpoint import byte_level_bos_tokenizer

MESSAGES = [{"role": "user", "content": "the fox"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_level_bos_tokenizer().save_pretrained(folder)
    loaded = load_tokenizer(str(folder))
    assert loaded is not None
    return loaded


def test_a_prompt_gets_the_special_tokens_that_the_tokenizer_adds(tokenizer: PreTrainedTokenizerFast) -> None:
    token_ids = encode_prompt(tokenizer, "the fox")
    assert token_ids[0] == 1 and token_ids.count(1) == 1
    assert tokenizer.decode(token_ids[1:]) == "the fox"


def test_a_prompt_longer_than_the_tokenizer_says_is_not_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.model_max_length = 4
    assert tokenizer.decode(encode_prompt(tokenizer, "the fox " * 20)[1:]) == "the fox " * 20


def test_a_conversation_has_one_bos_and_ends_with_the_assistants_header(tokenizer: PreTrainedTokenizerFast) -> None:
    token_ids = apply_chat(tokenizer, MESSAGES)
    assert token_ids.count(1) == 1
    assert tokenizer.decode(token_ids) == "<s>[user]the fox\n[assistant]"
    assert tokenizer.decode(apply_chat(tokenizer, MESSAGES, add_generation_prompt=False)) == "<s>[user]the fox\n"


def test_what_a_template_understands_besides_reaches_it() -> None:
    tokenizer = byte_level_bos_tokenizer("{% if enable_thinking %}yes{% else %}no{% endif %}")
    assert tokenizer.decode(apply_chat(tokenizer, MESSAGES, enable_thinking=True)) == "yes"
    assert tokenizer.decode(apply_chat(tokenizer, MESSAGES)) == "no"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"messages=\[\] must be a non-empty list"),
        ("hello", "messages='hello' must be a non-empty list"),
        ({"role": "user"}, "must be a non-empty list"),
        (["hello"], r"messages\[0\]='hello' must be a mapping"),
        ([{"content": "x"}], r"messages\[0\]=.* must be a mapping with 'role' and 'content'"),
        ([{"role": "user"}], r"messages\[0\]=.* has no 'content'; add it"),
    ],
)
def test_malformed_messages_are_refused(tokenizer: PreTrainedTokenizerFast, messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_chat(tokenizer, messages)


def test_without_a_template_a_conversation_is_refused() -> None:
    with pytest.raises(ValueError, match="this tokenizer has no chat template; give a text prompt"):
        apply_chat(byte_level_bos_tokenizer(chat_template=None), MESSAGES)


def test_what_the_template_itself_refuses_is_an_error_of_the_messages() -> None:
    tokenizer = byte_level_bos_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match="messages: the chat template rejects them: roles must alternate"):
        apply_chat(tokenizer, MESSAGES)


def test_a_prompt_that_is_no_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="prompt=3 must be a str or a list of token ids"):
        encode_prompt(tokenizer, 3)  # type: ignore[arg-type]


def test_a_checkpoint_without_tokenizer_files_has_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert load_tokenizer(str(tmp_path)) is None


def test_a_tokenizer_that_cannot_be_read_is_refused_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer='.*' ?: its files cannot be read .*; give a folder with tokenizer.json"):
        load_tokenizer(str(tmp_path))


def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("absent/folder/deep", "nobody/has-this"):
        with pytest.raises(ValueError, match=f"tokenizer='{name}' is neither a local folder nor a hub id"):
            load_tokenizer(name)


def test_the_driver_decodes_what_the_client_encoded(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "the lazy dog 你好 🙂"
    stream = Detokenizer(tokenizer_json(tokenizer)).new_stream([1])
    for token_id in encode_prompt(tokenizer, text):
        stream.append(token_id)
    stream.finish()
    assert stream.text == text
