"""Rewriting: the task of recipes that write one text for another, without data and score."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lockstep.errors import DataError, JobError
from lockstep.job.task import Parameters, Task
from lockstep.recipes import at_least
from lockstep.recipes.datasets.text_pairs import Split
from lockstep.recipes.text.beam import write
from lockstep.recipes.text.encoded import EncodedPairs, padded, read
from lockstep.recipes.text.packing import PADDING
from lockstep.recipes.text.transformer import Shape, Transformer
from lockstep.recipes.text.vocabulary import SPECIAL, Vocabulary


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings: the hyperparameters that a recipe chooses."""

    epochs: float
    batch_size: int
    rate: float
    """The highest learning rate."""
    vocabulary: int
    """Number of subwords."""
    width: int
    encoders: int
    decoders: int
    longest: tuple[int, int]
    """Most tokens of a source, and of a target."""
    heads: int = 4
    dropout: float = 0.1
    smoothing: float = 0.1
    beams: int = 4
    warm_up: float = 0.1
    """The fraction of the run in which the learning rate rises."""

    def __post_init__(self) -> None:
        at_least(self.heads, width=self.width)
        at_least(SPECIAL + 256, vocabulary=self.vocabulary)  # it contains all bytes
        if self.width % self.heads:
            raise JobError(
                "width cannot be divided among the heads",
                expected=f"a multiple of {self.heads}",
                found=str(self.width),
            )


class Rewriting(Task):
    """Task of writing targets for sources; a recipe adds the data and the score."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def read_split(self) -> Split:
        """Read the pairs."""
        raise NotImplementedError

    @functools.cached_property
    def split(self) -> Split:
        """The pairs, read on first use."""
        return self.read_split()

    @functools.cached_property
    def vocabulary(self) -> Vocabulary:
        """The subwords of sources and targets, learned from the training pairs."""
        texts = (text for pair in self.split.train for text in pair)
        return Vocabulary.learn(texts, self.settings.vocabulary)

    @functools.cached_property
    def encoded(self) -> EncodedPairs:
        """The training pairs as tokens."""
        return EncodedPairs(self.split.train, self.vocabulary, self.settings.longest)

    def model(self) -> nn.Module:
        """A fresh transformer."""
        chosen = self.settings
        return Transformer(
            Shape(
                vocabulary=len(self.vocabulary), width=chosen.width, heads=chosen.heads,
                encoders=chosen.encoders, decoders=chosen.decoders, dropout=chosen.dropout,
            )
        )  # fmt: skip

    def train_data(self) -> EncodedPairs:
        """The training pairs."""
        return self.encoded

    def eval_data(self) -> EncodedPairs:
        """The held-out pairs."""
        return EncodedPairs(self.split.held_out, self.vocabulary, self.settings.longest)

    def collate(self, samples: list[Any]) -> Any:
        """Tables of tokens `[n, longest of this batch]` (int64), padded: of sources and of targets.

        Samples from records are texts, and are returned as they are.
        """
        if isinstance(samples[0], str):
            return samples
        return padded([source for source, _ in samples]), padded([target for _, target in samples])

    @functools.cached_property
    def mean_length(self) -> float:
        """The mean number of tokens in a target, without its begin."""
        return len(self.encoded.targets.tokens) / len(self.encoded) - 1

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean cross-entropy of the targets' tokens.

        Divided by the mean number of tokens of all targets, not of these, so that every token has
        the same weight, and the loss of a batch is the mean over its samples.
        """
        losses = model(*batch, smoothing=self.settings.smoothing)
        scaled: torch.Tensor = losses.mean() / self.mean_length
        return scaled

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """AdamW, with weight decay for weights only."""
        groups = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.settings.rate, betas=(0.9, 0.98))

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """Linear warm-up, then cosine decay to 0."""
        chosen = self.settings
        size = self.planned_batch_size or chosen.batch_size
        steps = max(1.0, chosen.epochs * math.ceil(len(self.encoded) / size))

        def factor(step: int) -> float:
            done = min(1.0, (step + 1) / steps)
            if done < chosen.warm_up:
                return done / chosen.warm_up
            return 0.5 + 0.5 * math.cos(math.pi * (done - chosen.warm_up) / (1 - chosen.warm_up))

        return LambdaLR(optimizer, factor)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | float]:
        """Per pair, `[n]`: the cross-entropy of its target's tokens."""
        tokens = (batch[1][:, 1:] != PADDING).sum(dim=1)
        return {"loss": model(*batch) / tokens}

    def outputs(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        """Per pair: the text written for its source."""
        return {"texts": self.write(model, batch[0])}

    def write(self, model: nn.Module, sources: torch.Tensor) -> list[str]:
        """A text for each row of tokens, `[n, length]` (int64), by beam search."""
        assert isinstance(model, Transformer)
        longest = min(self.settings.longest[1], 2 * sources.shape[1] + 8)
        rows = write(model, sources, self.settings.beams, longest)
        return self.vocabulary.decode(rows.tolist())

    def fitted(self) -> str:
        """The vocabulary."""
        return str(self.vocabulary)

    def from_record(self, record: Mapping[str, Any]) -> str:
        """A text, from `source`."""
        text = record.get("source")
        if not isinstance(text, str):
            raise _no_text(f"the columns {', '.join(record)}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # a half of a surrogate pair, which JSON allows
            raise _no_text(str(error)) from None
        return text

    def predict(self, model: nn.Module, texts: Sequence[str]) -> list[dict[str, Any]]:
        """The text written for each of the texts."""
        sources = read(texts, self.vocabulary, self.settings.longest[0])
        with torch.no_grad():
            return [{"text": text} for text in self.write(model, padded(sources))]


def _no_text(found: str) -> DataError:
    return DataError(
        "a record is not a text",
        expected='{"source": "the text to rewrite"}',
        found=found,
    )
