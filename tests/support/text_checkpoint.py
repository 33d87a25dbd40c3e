"""text_checkpoint: a small random checkpoint that reads and writes text: weights, tokenizer and chat template."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.support.checkpoints import tiny_checkpoint

TEXT = "the quick brown fox jumps over the lazy dog, and 你好 🙂 again."
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_level_bos_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most 331 tokens: <unk> 0, <s> 1 (put before every text), </s> 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.chat_template = chat_template
    return wrapped


def text_checkpoint(folder: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write a tiny random Llama and its tokenizer into ``folder`` and return it."""
    tiny_checkpoint(folder)
    byte_level_bos_tokenizer(chat_template).save_pretrained(folder)
    return folder
