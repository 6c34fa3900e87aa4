"""ROUGE: the overlap of two texts in words, pairs of words and longest common subsequences.

Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004. F1 of each pair, then the mean,
on words in lower case without stemming, as the package rouge-score computes it by default.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence


def rouge(texts: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """The mean ROUGE-1, ROUGE-2 and ROUGE-L of texts, 0 to 1."""
    pairs = [(_words(a), _words(b)) for a, b in zip(texts, wanted, strict=True)]
    return {
        "rouge1": sum(_overlap(a, b, 1) for a, b in pairs) / len(pairs),
        "rouge2": sum(_overlap(a, b, 2) for a, b in pairs) / len(pairs),
        "rougeL": sum(_f1(_common(a, b), len(a), len(b)) for a, b in pairs) / len(pairs),
    }


def _words(text: str) -> list[str]:
    return re.findall("[a-z0-9]+", text.lower())


def _overlap(text: list[str], wanted: list[str], length: int) -> float:
    """F1 of the n-grams of `length` words, each counted as often as both texts have it."""
    runs = [Counter(zip(*(words[i:] for i in range(length)), strict=False))
            for words in (text, wanted)]  # fmt: skip
    return _f1((runs[0] & runs[1]).total(), runs[0].total(), runs[1].total())


def _common(text: list[str], wanted: list[str]) -> int:
    """The length of the longest common subsequence of words."""
    lengths = [0] * (len(wanted) + 1)
    for word in text:
        diagonal = 0
        for index, other in enumerate(wanted, start=1):
            above = lengths[index]
            longest = max(above, lengths[index - 1])
            lengths[index] = diagonal + 1 if word == other else longest
            diagonal = above
    return lengths[-1]


def _f1(hits: int, found: int, wanted: int) -> float:
    return 2 * hits / (found + wanted) if hits else 0.0
