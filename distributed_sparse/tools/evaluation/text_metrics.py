"""text_metrics: scores of a generated text against references, each in 0..1.

They reimplement LongBench's (Bai et al., arXiv 2308.14508). ROUGE-L is the F1 of the longest common subsequence of words,
without the `rouge` package; Chinese is split into characters, without the `jieba` package.
"""

from __future__ import annotations

import difflib
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def substring_share(text: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the text, ignoring case (RULER, arXiv 2404.06654)."""
    lowered = text.lower()
    return sum(reference.lower() in lowered for reference in references) / len(references)


def english_words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles (SQuAD's normalisation)."""
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return _ARTICLES.sub(" ", bare).split()


def chinese_characters(text: str) -> list[str]:
    """Lower-case characters without white space and punctuation of any script."""
    return [char for char in text.lower() if not char.isspace() and unicodedata.category(char)[0] not in "PS"]


def f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of two bags of words."""
    common = (Counter(predicted) & Counter(wanted)).total()
    return 2 * common / (len(predicted) + len(wanted)) if common else 0.0


def rouge_l(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """F1 of the longest common subsequence."""
    row = [0] * (len(wanted) + 1)
    for word in predicted:
        diagonal = 0
        for i, other in enumerate(wanted, 1):
            diagonal, row[i] = row[i], diagonal + 1 if word == other else max(row[i], row[i - 1])
    return 2 * row[-1] / (len(predicted) + len(wanted)) if row[-1] else 0.0


def classification(text: str, wanted: str, classes: Sequence[str]) -> float:
    """1 / (number of classes in the text) if the wanted one is among them, else 0; substrings of its name do not count."""
    named = [name for name in classes if name in text and not (name != wanted and name in wanted)]
    return 1 / len(named) if wanted in named else 0.0


def retrieval(text: str, wanted: str) -> float:
    """Share of the numbers in the text that equal the wanted paragraph's ("Paragraph 12", "段落12").

    Raises:
        ValueError: `wanted` holds no number.
    """
    number = re.search(r"\d+", wanted)
    if number is None:
        raise ValueError(f"retrieval: the answer {wanted!r} names no paragraph; is this a passage_retrieval file?")
    return count(text, number.group())


def count(text: str, wanted: str) -> float:
    """Share of the numbers in the text that equal the wanted one."""
    numbers = re.findall(r"\d+", text)
    return numbers.count(str(wanted)) / len(numbers) if numbers else 0.0


def code_similarity(text: str, wanted: str) -> float:
    """Similarity of the text's first line of code and the wanted line: 2 x matching characters / all characters."""
    lines = [line for line in text.lstrip("\n").split("\n") if not any(mark in line for mark in ("`", "#", "//"))]
    return difflib.SequenceMatcher(None, lines[0] if lines else "", wanted, autojunk=False).ratio()
