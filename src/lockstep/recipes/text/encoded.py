"""Encoded pairs: pairs of texts as tokens, as a data set and as batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from lockstep.recipes.datasets.text_pairs import Pair
from lockstep.recipes.text.beam import BEGIN, END
from lockstep.recipes.text.packing import PADDING
from lockstep.recipes.text.vocabulary import Vocabulary

Row = NDArray[np.int32]
TAIL = 30
"""For a text that is too long, the percentage of the kept tokens that is taken from its end."""
Sample = tuple[Row, Row]
"""Tokens of a source, and of its target with begin and end."""


@dataclass(frozen=True, kw_only=True)
class Ragged:
    """Ragged array: rows of tokens of any lengths in one array."""

    tokens: Row
    starts: NDArray[np.int64]
    """The start of each row, and the end of the last one."""

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Ragged:
        """From lists of tokens."""
        listed = list(rows)
        return cls(
            tokens=np.array([token for row in listed for token in row], np.int32),
            starts=np.cumsum([0, *map(len, listed)]),
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> Row:
        return self.tokens[self.starts[index] : self.starts[index + 1]]


class EncodedPairs(Dataset[Sample]):
    """Data set of pairs as tokens, truncated to `longest` (source, target); see `read`."""

    def __init__(
        self, pairs: Sequence[Pair], vocabulary: Vocabulary, longest: tuple[int, int]
    ) -> None:
        sources, targets = zip(*pairs, strict=True)
        self.sources = Ragged.of(read(sources, vocabulary, longest[0]))
        self.targets = Ragged.of(
            [BEGIN, *row[: longest[1] - 1], END] for row in vocabulary.encode(targets)
        )

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Sample:
        return self.sources[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        return [self[index] for index in indices]


def read(texts: Sequence[str], vocabulary: Vocabulary, longest: int) -> list[list[int]]:
    """Tokens of sources, each with the end token, so that none is empty.

    Of a text longer than `longest` the beginning and the end are kept, which say most.
    """
    # A word is at least one token, so the words in between would be left out in any case.
    ends = [
        " ".join([*words[:longest], *words[longest:][-longest:]])
        for words in (text.split() for text in texts)
    ]
    last = longest * TAIL // 100
    return [
        [*row, END] if len(row) < longest else [*row[: longest - last], *row[1 - last :], END]
        for row in vocabulary.encode(ends)
    ]


def padded(rows: Sequence[Row | list[int]]) -> torch.Tensor:
    """Rows of tokens as a table, `[rows, longest]` (int64)."""
    table = np.full((len(rows), max(map(len, rows))), PADDING, np.int64)
    for filled, row in zip(table, rows, strict=True):
        filled[: len(row)] = row
    return torch.from_numpy(table)
