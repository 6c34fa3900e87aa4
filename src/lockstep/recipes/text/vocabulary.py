"""Vocabulary: subwords that are learned from texts, so that no word is unknown.

Byte pair encoding (Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with
Subword Units", 2016) on bytes, by the package tokenizers. The same texts give the same subwords.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from lockstep.errors import JobError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = 3
"""The number of special tokens, which come first: padding, begin and end."""


class Vocabulary:
    """Vocabulary: encodes texts as tokens, and decodes tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def learn(cls, texts: Iterable[str], size: int) -> Vocabulary:
        """Learn `size` tokens from texts.

        Raises:
            JobError: the package tokenizers is missing.
        """
        # Its threads do not survive the fork into workers.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        try:
            from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        except ImportError:
            raise JobError(
                "the recipes on texts need subwords",
                expected="the package tokenizers",
                found="no such package",
                fix="pip install 'lockstep-dlp[text]'",
            ) from None
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size - SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def __str__(self) -> str:
        """The whole tokenizer as JSON."""
        return self._tokenizer.to_str()

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size() + SPECIAL

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The tokens of each text."""
        for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False):
            yield [number + SPECIAL for number in encoding.ids]

    def decode(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """The texts of rows of tokens; special tokens are left out."""
        pieces = [[number - SPECIAL for number in row if number >= SPECIAL] for row in rows]
        return [self._tokenizer.decode(row).strip() for row in pieces]
