"""Token ids are those of the checkpoint's tokenizer.json, in both directions, whatever class tokenizer_config.json names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from distributed_sparse.client.tokenizer import encode_prompt, load_tokenizer, tokenizer_json
from distributed_sparse.driver.detokenizer import Detokenizer

CLASSES = [
    "GPT2Tokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast", "CodeLlamaTokenizer", "LlamaTokenizer", "LlamaTokenizerFast",
    "GPTNeoXTokenizer", "GemmaTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", "NoSuchTokenizer", None,
]  # fmt: skip
FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
TEXTS = [
    "the quick fox saw 1984 dogs",
    " The  dogs, and 1234567 don't\n\n  stop — naïve “Köln” ﬁ\u00a0x\t",
    "你好,世界。🙂👩‍👩‍👧",
    "a</s>b<tool>c <tool> <FILL_ME> d<|x|>e",
    "",
]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
SENTENCEPIECE = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def sequence(*steps: Any) -> Any:
    return pre_tokenizers.Sequence(list(steps))


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


# name -> normalizer, pre-tokenizer, decoder
PIPELINES: dict[str, tuple[Any, Any, Any]] = {
    "byte_level": (None, BYTE_LEVEL, decoders.ByteLevel()),
    "prefix_space": (None, pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()),
    "digits": (None, sequence(pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL), decoders.ByteLevel()),
    "llama3": (
        None,
        sequence(split(LLAMA3), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        decoders.ByteLevel(),
    ),
    "split": (normalizers.NFC(), sequence(split(r"\d|[a-c]+"), BYTE_LEVEL), decoders.ByteLevel()),
    "lowercase": (normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), BYTE_LEVEL, decoders.ByteLevel()),
    "legacy_llama": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None, SENTENCEPIECE),
    "metaspace_first": (None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), SENTENCEPIECE),
    "metaspace_never": (
        None,
        pre_tokenizers.Metaspace(prepend_scheme="never"),
        decoders.Metaspace(prepend_scheme="never"),
    ),
    "metaspace": (normalizers.Replace("dogs", "cats"), pre_tokenizers.Metaspace(), decoders.Metaspace()),
}
POST_PROCESSORS: dict[str, Any] = {
    "none": None,
    "byte_level": processors.ByteLevel(trim_offsets=False),
    "bos": processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]),
    "bos_and_eos": processors.Sequence(
        [
            processors.ByteLevel(),
            processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]),
        ]
    ),
}


def make_tokenizer(pipeline: str, post_processor: str = "none", unigram: bool = False) -> Tokenizer:
    """A tokenizer of about 600 tokens: <unk> 0, <s> 1, </s> 2, the bytes, and one added token that shows in the text."""
    model: Any = models.Unigram() if unigram else models.BPE(unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = PIPELINES[pipeline]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    kind: Any = trainers.UnigramTrainer if unigram else trainers.BpeTrainer
    options = {"unk_token": "<unk>"} if unigram else {}
    trainer = kind(vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False, **options)
    tokenizer.train_from_iterator(TEXTS[:3] * 2, trainer)
    raw = json.loads(tokenizer.to_str())  # the trainer marks the bytes as special; in a checkpoint they are not
    tokenizer = Tokenizer.from_str(json.dumps(raw | {"added_tokens": raw["added_tokens"][:3]}))
    tokenizer.add_tokens([AddedToken("<tool>", special=False, rstrip=True)])
    tokenizer.add_special_tokens([AddedToken("<|x|>", special=True, normalized=False)])
    tokenizer.post_processor = POST_PROCESSORS[post_processor]
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, family: str = "llama", **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": family}))
    return folder


def check(folder: Path) -> Any:
    """Compare with the tokenizers library, token by token and text by text."""
    loaded = load_tokenizer(str(folder))
    assert loaded is not None
    reference = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reference.no_truncation()
    reference.no_padding()
    detokenizer = Detokenizer(tokenizer_json(loaded))
    for text in TEXTS:
        token_ids = reference.encode(text).ids
        assert encode_prompt(loaded, text) == token_ids
        assert loaded(text, add_special_tokens=False)["input_ids"] == reference.encode(text, add_special_tokens=False).ids
        stream = detokenizer.new_stream([])
        for token_id in token_ids:
            stream.append(token_id)
        stream.finish()
        assert stream.text == reference.decode(token_ids)
        assert loaded.decode(token_ids) == reference.decode(token_ids, skip_special_tokens=False)
    return loaded


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_no_class_changes_what_tokenizer_json_says(pipeline: str, tmp_path: Path) -> None:
    post_processors = list(POST_PROCESSORS)
    for number, name in enumerate(CLASSES):
        tokenizer = make_tokenizer(pipeline, post_processors[number % len(post_processors)])
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": bool(number % 2)}
        config = {**names, "add_prefix_space": True, **({"tokenizer_class": name} if name else {})}
        loaded = check(write(tmp_path / "folder", tokenizer, FAMILIES[number % len(FAMILIES)], **config))
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (1, 2, 0)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "GPT2Tokenizer", "T5Tokenizer"])
def test_no_class_changes_the_kind_of_model(name: str, tmp_path: Path) -> None:
    check(write(tmp_path, make_tokenizer("metaspace", "bos", unigram=True), tokenizer_class=name, bos_token="<s>"))


def test_a_class_that_wants_code_of_the_checkpoint_needs_none_of_it(tmp_path: Path) -> None:
    auto_map = {"AutoTokenizer": ["tokenization_x.XTokenizer", None]}
    check(write(tmp_path, make_tokenizer("digits"), tokenizer_class="XTokenizer", auto_map=auto_map))


def test_truncation_and_padding_of_tokenizer_json_cut_or_fill_no_prompt(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("byte_level", "bos")
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64, pad_token="</s>", pad_id=2)
    loaded = check(write(tmp_path, tokenizer, model_max_length=4))
    assert len(encode_prompt(loaded, TEXTS[0])) > 4
    assert json.loads(tokenizer_json(loaded))["truncation"] is None


def test_special_tokens_that_no_vocabulary_has_get_no_id(tmp_path: Path) -> None:
    # transformers would add [PAD] and <|im_end|> behind the vocabulary, where the model has no embedding.
    tokenizer = make_tokenizer("byte_level")
    loaded = check(write(tmp_path, tokenizer, pad_token="[PAD]", eos_token="<|im_end|>", bos_token="<s>", unk_token="<unk>"))
    assert (loaded.pad_token, loaded.eos_token, loaded.eos_token_id, loaded.bos_token_id) == (None, None, None, 1)
    assert len(loaded) == tokenizer.get_vocab_size()


def test_special_tokens_of_the_vocabulary_that_tokenizer_json_lists_nowhere_are_special(tmp_path: Path) -> None:
    raw = json.loads(make_tokenizer("byte_level").to_str())
    tokenizer = Tokenizer.from_str(json.dumps(raw | {"added_tokens": []}))
    loaded = load_tokenizer(str(write(tmp_path, tokenizer, bos_token="<s>", eos_token="</s>")))
    assert loaded is not None
    assert encode_prompt(loaded, "<s></s>") == [1, 2]
    assert loaded.decode([1, 2], skip_special_tokens=True) == ""


def test_added_tokens_of_other_files_are_added_under_their_own_ids_alone(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("byte_level")
    size = tokenizer.get_vocab_size()
    own = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    declared = {
        str(size): own | {"content": "<|call|>"},
        str(size + 5): own | {"content": "<|far|>"},
        str(tokenizer.token_to_id("<tool>")): own | {"content": "<tool>"},  # special here, not in tokenizer.json
    }
    loaded = check(write(tmp_path, tokenizer, added_tokens_decoder=declared))
    assert encode_prompt(loaded, "<|call|>") == [size]
    assert encode_prompt(loaded, "<|far|>") == tokenizer.encode("<|far|>").ids


def test_several_chat_templates_and_template_files_are_kept(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "of config"}, {"name": "tool_use", "template": "of tools"}]
    folder = write(tmp_path, make_tokenizer("digits"), tokenizer_class="GPT2Tokenizer", chat_template=named)
    assert check(folder).chat_template == {"default": "of config", "tool_use": "of tools"}
    (folder / "chat_template.jinja").write_text("of the file")
    assert check(folder).chat_template == "of the file"


def test_a_chat_template_in_json_is_read_where_there_is_no_other(tmp_path: Path) -> None:
    folder = write(tmp_path, make_tokenizer("digits"))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "of json"}))
    assert check(folder).chat_template == "of json"
