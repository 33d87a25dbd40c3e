"""LongBench's datasets: how each is asked, how long its answers are, and how they are judged."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distributed_sparse.tools.evaluation import text_metrics
from distributed_sparse.tools.evaluation.text_metrics import chinese_characters, english_words, f1, rouge_l
from distributed_sparse.utils.validation import shown

Metric = Callable[[str, str, Sequence[str]], float]
"""(generated text, one reference, the dataset's classes) -> 0..1."""


@dataclass(frozen=True)
class Dataset:
    """`template`: own words, used where the benchmark's are not at hand. `first_line`: only that of an answer counts.
    `chat`: whether LongBench puts the prompt into a chat template."""

    template: str
    max_tokens: int
    metric: Metric
    first_line: bool = False
    chat: bool = True


def _qa(text: str, wanted: str, _: Sequence[str]) -> float:
    return f1(english_words(text), english_words(wanted))


def _qa_chinese(text: str, wanted: str, _: Sequence[str]) -> float:
    return f1(chinese_characters(text), chinese_characters(wanted))


def _summary(text: str, wanted: str, _: Sequence[str]) -> float:
    return rouge_l(text.lower().split(), wanted.lower().split())


def _summary_chinese(text: str, wanted: str, _: Sequence[str]) -> float:
    return rouge_l(chinese_characters(text), chinese_characters(wanted))


def _count(text: str, wanted: str, _: Sequence[str]) -> float:
    return text_metrics.count(text, wanted)


def _retrieval(text: str, wanted: str, _: Sequence[str]) -> float:
    return text_metrics.retrieval(text, wanted)


def _code(text: str, wanted: str, _: Sequence[str]) -> float:
    return text_metrics.code_similarity(text, wanted)


_QUESTION = (
    "Read the following and answer the question after it, as briefly as possible.\n\n{context}\n\nQuestion: {input}\nAnswer:"
)
_QUESTION_CHINESE = "请阅读下面的材料，然后简短地回答问题。\n\n{context}\n\n问题：{input}\n回答："
_SUMMARY = "Read the following.\n\n{context}\n\nSummarise it in one page.\n\nSummary:"
_CODE = "Continue this code with one line.\n{context}{input}\nNext line:\n"

DATASETS: dict[str, Dataset] = {
    "narrativeqa": Dataset(_QUESTION, 128, _qa),
    "qasper": Dataset(_QUESTION, 128, _qa),
    "multifieldqa_en": Dataset(_QUESTION, 64, _qa),
    "multifieldqa_zh": Dataset(_QUESTION_CHINESE, 64, _qa_chinese),
    "hotpotqa": Dataset(_QUESTION, 32, _qa),
    "2wikimqa": Dataset(_QUESTION, 32, _qa),
    "musique": Dataset(_QUESTION, 32, _qa),
    "dureader": Dataset(_QUESTION_CHINESE, 128, _summary_chinese),
    "gov_report": Dataset(_SUMMARY, 512, _summary),
    "qmsum": Dataset(_QUESTION, 512, _summary),
    "multi_news": Dataset(_SUMMARY, 512, _summary),
    "vcsum": Dataset("请阅读下面的会议记录。\n\n{context}\n\n请写出会议总结：", 512, _summary_chinese),
    "trec": Dataset(
        "Tell the type of the last question, as in the examples.\n\n{context}\n{input}",
        64, text_metrics.classification, first_line=True, chat=False,
    ),
    "triviaqa": Dataset(
        "Answer from the last passage, as briefly as in the examples.\n\n{context}\n\n{input}",
        32, _qa, first_line=True, chat=False,
    ),
    "samsum": Dataset(
        "Summarise the last dialogue in a few short sentences, as in the examples.\n\n{context}\n\n{input}",
        128, _summary, first_line=True, chat=False,
    ),
    "lsht": Dataset(
        "请像例子一样判断最后一条新闻的类别。\n\n{context}\n{input}",
        64, text_metrics.classification, first_line=True, chat=False,
    ),
    "passage_count": Dataset(
        "Some of these paragraphs are repeated.\n\n{context}\n\nHow many different paragraphs are there? Only the number: ",
        32, _count,
    ),
    "passage_retrieval_en": Dataset(
        "Here are numbered paragraphs.\n\n{context}\n\nThis is the abstract of one of them:\n\n{input}\n\n"
        'Of which? Answer as in "Paragraph 1".\n\nAnswer: ',
        32, _retrieval,
    ),
    "passage_retrieval_zh": Dataset(
        "下面是编号的段落。\n\n{context}\n\n这是其中一段的摘要：\n\n{input}\n\n是哪一段？请按“段落1”的格式回答。\n\n答案：",
        32, _retrieval,
    ),
    "lcc": Dataset(_CODE, 64, _code, chat=False),
    "repobench-p": Dataset(_CODE, 64, _code, chat=False),
}  # fmt: skip


def read_templates(file: str | None, folder: Path) -> dict[str, str]:
    """The benchmark's own prompts: of `file`, else of `dataset2prompt.json` in the data's folder or in `config/` beside it.

    Returns:
        dataset -> template; empty where there is no file.

    Raises:
        ValueError: the file cannot be read, or holds no templates.
    """
    places = (
        [Path(file)]
        if file
        else [place / "dataset2prompt.json" for place in (folder, folder / "config", folder.parent / "config")]
    )
    path = next((place for place in places if file or place.is_file()), None)
    if path is None:
        return {}
    try:
        templates = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"longbench: templates={str(path)!r} cannot be read ({error}); give dataset2prompt.json") from None
    if not isinstance(templates, dict) or not all(isinstance(t, str) and "{context}" in t for t in templates.values()):
        raise ValueError(f"longbench: templates={str(path)!r} holds {shown(templates)}; give dataset2prompt.json")
    return templates
