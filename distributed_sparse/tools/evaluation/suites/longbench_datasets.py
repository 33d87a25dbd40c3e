"""longbench_datasets: how each dataset of LongBench is asked, how long its answers are, and how they are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed_sparse.tools.evaluation import text_metrics
from distributed_sparse.tools.evaluation.files import read_json
from distributed_sparse.tools.evaluation.text_metrics import chinese_characters, english_words, f1, rouge_l
from distributed_sparse.utils.validation import shown

Metric = Callable[[str, str, Sequence[str]], float]
"""(generated text, one reference, the dataset's classes) -> 0..1."""


@dataclass(frozen=True)
class Dataset:
    """One dataset.

    Attributes:
        template: this project's wording, used without the benchmark's templates.
        max_tokens: of an answer.
        first_line: whether only the first line of an answer is scored.
        chat: whether LongBench puts the prompt into a chat template.
    """

    template: str
    max_tokens: int
    metric: Metric
    first_line: bool = False
    chat: bool = True


def _metric(score: Callable[[Any, Any], float], split: Callable[[str], Any] = str) -> Metric:
    """A metric without classes: `score` of both texts after `split`."""
    return lambda text, wanted, _: score(split(text), split(wanted))


_QA, _QA_CHINESE = _metric(f1, english_words), _metric(f1, chinese_characters)
_SUMMARY = _metric(rouge_l, lambda text: text.lower().split())
_SUMMARY_CHINESE = _metric(rouge_l, chinese_characters)
_COUNT, _RETRIEVAL = _metric(text_metrics.count), _metric(text_metrics.retrieval)
_CODE = _metric(text_metrics.code_similarity)

_ASK = "Read the following and answer the question after it, as briefly as possible.\n\n{context}\n\nQuestion: {input}\nAnswer:"
_ASK_CHINESE = "请阅读下面的材料，然后简短地回答问题。\n\n{context}\n\n问题：{input}\n回答："
_ASK_SUMMARY = "Read the following.\n\n{context}\n\nSummarise it in one page.\n\nSummary:"
_ASK_CODE = "Continue this code with one line.\n{context}{input}\nNext line:\n"

DATASETS: dict[str, Dataset] = {
    "narrativeqa": Dataset(_ASK, 128, _QA),
    "qasper": Dataset(_ASK, 128, _QA),
    "multifieldqa_en": Dataset(_ASK, 64, _QA),
    "multifieldqa_zh": Dataset(_ASK_CHINESE, 64, _QA_CHINESE),
    "hotpotqa": Dataset(_ASK, 32, _QA),
    "2wikimqa": Dataset(_ASK, 32, _QA),
    "musique": Dataset(_ASK, 32, _QA),
    "dureader": Dataset(_ASK_CHINESE, 128, _SUMMARY_CHINESE),
    "gov_report": Dataset(_ASK_SUMMARY, 512, _SUMMARY),
    "qmsum": Dataset(_ASK, 512, _SUMMARY),
    "multi_news": Dataset(_ASK_SUMMARY, 512, _SUMMARY),
    "vcsum": Dataset("请阅读下面的会议记录。\n\n{context}\n\n请写出会议总结：", 512, _SUMMARY_CHINESE),
    "trec": Dataset(
        "Tell the type of the last question, as in the examples.\n\n{context}\n{input}",
        64, text_metrics.classification, first_line=True, chat=False,
    ),
    "triviaqa": Dataset(
        "Answer from the last passage, as briefly as in the examples.\n\n{context}\n\n{input}",
        32, _QA, first_line=True, chat=False,
    ),
    "samsum": Dataset(
        "Summarise the last dialogue in a few short sentences, as in the examples.\n\n{context}\n\n{input}",
        128, _SUMMARY, first_line=True, chat=False,
    ),
    "lsht": Dataset(
        "请像例子一样判断最后一条新闻的类别。\n\n{context}\n{input}",
        64, text_metrics.classification, first_line=True, chat=False,
    ),
    "passage_count": Dataset(
        "Some of these paragraphs are repeated.\n\n{context}\n\nHow many different paragraphs are there? Only the number: ",
        32, _COUNT,
    ),
    "passage_retrieval_en": Dataset(
        "Here are numbered paragraphs.\n\n{context}\n\nThis is the abstract of one of them:\n\n{input}\n\n"
        'Of which? Answer as in "Paragraph 1".\n\nAnswer: ',
        32, _RETRIEVAL,
    ),
    "passage_retrieval_zh": Dataset(
        "下面是编号的段落。\n\n{context}\n\n这是其中一段的摘要：\n\n{input}\n\n是哪一段？请按“段落1”的格式回答。\n\n答案：",
        32, _RETRIEVAL,
    ),
    "lcc": Dataset(_ASK_CODE, 64, _CODE, chat=False),
    "repobench-p": Dataset(_ASK_CODE, 64, _CODE, chat=False),
}  # fmt: skip


def read_templates(file: str | None, folder: Path) -> dict[str, str]:
    """Read the benchmark's own prompts from `file`, else from `dataset2prompt.json`.

    Args:
        folder: the data's; without `file`, it, its `config/` and the `config/` beside it are searched in this order.

    Returns:
        dataset -> template; empty if there is no file.

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
    templates = read_json("longbench: templates", path, "dataset2prompt.json")
    if not isinstance(templates, dict) or not all(isinstance(t, str) and "{context}" in t for t in templates.values()):
        raise ValueError(f"longbench: templates={str(path)!r} holds {shown(templates)}; give dataset2prompt.json")
    return templates
