"""Neighbours: nearest texts by TF-IDF, as a baseline without training."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def words_of(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return re.findall(r"\w+", text.casefold())


class Neighbours:
    """Nearest-neighbour index of texts, by the cosine of TF-IDF weights."""

    def __init__(self, texts: Sequence[str]) -> None:
        counts = [Counter(words_of(text)) for text in texts]
        self._size = len(texts)
        spread = Counter(word for count in counts for word in count)
        self._rarity = {word: math.log(self._size / n) + 1 for word, n in spread.items()}
        places: dict[str, tuple[list[int], list[float]]] = {word: ([], []) for word in spread}
        for index, count in enumerate(counts):
            weights = {word: n * self._rarity[word] for word, n in count.items()}
            length = math.sqrt(sum(weight**2 for weight in weights.values()))
            for word, weight in weights.items():
                places[word][0].append(index)
                places[word][1].append(weight / length)
        self._places: dict[str, tuple[NDArray[np.int64], NDArray[np.float64]]] = {
            word: (np.array(where), np.array(weights)) for word, (where, weights) in places.items()
        }

    def nearest(self, text: str) -> int:
        """The index of the text most similar to this one; the first of several."""
        scores = np.zeros(self._size)
        for word, count in sorted(Counter(words_of(text)).items()):
            if word in self._places:
                where, weights = self._places[word]
                scores[where] += count * self._rarity[word] * weights
        return int(scores.argmax())
