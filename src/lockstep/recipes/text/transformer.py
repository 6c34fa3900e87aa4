"""Transformer: an encoder-decoder that can copy words of the source (pointer-generator).

Encoder and decoder normalise before each layer (Xiong et al., "On Layer Normalization in the
Transformer Architecture", 2020), and share one table of embeddings with the output. A next token is
either drawn from the vocabulary or copied from the source, as in See, Liu and Manning, "Get To The
Point: Summarization with Pointer-Generator Networks", 2017.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from lockstep.recipes.text.attention import Attention
from lockstep.recipes.text.packing import Packing

TINY = 1e-9
"""The probability of copying a token that is not in the source."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape: the sizes of a transformer."""

    vocabulary: int
    width: int
    heads: int
    encoders: int
    decoders: int
    dropout: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory: the encoded sources, as decoder steps use them."""

    tokens: torch.Tensor
    """`[rows, length]`, int64."""
    rows: Packing
    keys_values: tuple[torch.Tensor, ...]
    """For each decoder layer, `[rows, length, 2 * width]`."""
    pointers: torch.Tensor
    """Keys of the copy mechanism, `[rows, length, width]`."""


class Feed(nn.Sequential):
    """Feed-forward block of a layer."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )


class EncoderLayer(nn.Module):
    """Encoder layer: self-attention and feed-forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(shape.width) for _ in range(2))
        self.attention = Attention(shape.width, shape.heads)
        self.feed = Feed(shape.width, shape.dropout)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, tokens: torch.Tensor, rows: Packing) -> torch.Tensor:
        """`[n, width]` to `[n, width]`."""
        normed = self.norms[0](tokens)
        tokens = tokens + self.dropout(self.attention(normed, normed, rows, rows))
        out: torch.Tensor = tokens + self.feed(self.norms[1](tokens))
        return out


class DecoderLayer(nn.Module):
    """Decoder layer: causal self-attention, cross-attention and feed-forward."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(shape.width) for _ in range(3))
        self.written = Attention(shape.width, shape.heads)
        self.source = Attention(shape.width, shape.heads)
        self.feed = Feed(shape.width, shape.dropout)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(
        self, tokens: torch.Tensor, source: torch.Tensor, rows: Packing, source_rows: Packing
    ) -> torch.Tensor:
        """`[n, width]` to `[n, width]`, with the encoded source `[m, width]`."""
        normed = self.norms[0](tokens)
        tokens = tokens + self.dropout(self.written(normed, normed, rows, rows, causal=True))
        normed = self.norms[1](tokens)
        tokens = tokens + self.dropout(self.source(normed, source, rows, source_rows))
        out: torch.Tensor = tokens + self.feed(self.norms[2](tokens))
        return out

    def remember(self, source: torch.Tensor) -> torch.Tensor:
        """Keys and values of the encoded source, `[m, width]` to `[m, 2 * width]`, for `step`."""
        out: torch.Tensor = self.source.key_value(source)
        return out

    def step(
        self,
        tokens: torch.Tensor,
        before: torch.Tensor,
        keys_values: torch.Tensor,
        there: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` for the newest token of each text; see `Attention.extend` and `.look`."""
        seen, before = self.written.extend(self.norms[0](tokens), before)
        tokens = tokens + seen
        tokens = tokens + self.source.look(self.norms[1](tokens), keys_values, there)
        return tokens + self.feed(self.norms[2](tokens)), before


class Transformer(nn.Module):
    """Encoder-decoder: log-probabilities of target texts, given source texts."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.width = shape.width
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.dropout = nn.Dropout(shape.dropout)
        self.encoders = nn.ModuleList(EncoderLayer(shape) for _ in range(shape.encoders))
        self.decoders = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.decoders))
        self.read = nn.LayerNorm(shape.width)
        self.written = nn.LayerNorm(shape.width)
        self.pointing = nn.Linear(shape.width, shape.width)
        self.pointed = nn.Linear(shape.width, shape.width)
        self.gate = nn.Linear(shape.width, 1)
        nn.init.normal_(self.embedding.weight, std=shape.width**-0.5)

    def forward(
        self, sources: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0
    ) -> torch.Tensor:
        """The negative log-likelihood of each target, `[rows]`, in nats.

        Args:
            sources: Tokens `[rows, length]` (int64), padded.
            targets: Tokens `[rows, length]` (int64), padded, with begin and end.
            smoothing: Label smoothing: the probability that is spread over the vocabulary.
        """
        labels = targets[:, 1:]
        rows, source_rows = Packing.of(labels), Packing.of(sources)
        wanted = rows.pack(labels)
        source = self.encode(sources, source_rows)
        tokens = self._embed(targets[:, :-1], rows)
        for layer in self.decoders:
            tokens = layer(tokens, source, rows, source_rows)
        tokens = self.written(tokens)
        log_probs = self._scores(tokens).log_softmax(dim=1)
        weights = self._copying(
            rows.spread(self.pointing(tokens)),
            source_rows.spread(self.pointed(source)),
            source_rows.there,
        )
        match = labels[:, :, None] == sources[:, None, :]
        copied = rows.pack((weights * match).sum(dim=2))
        gate = self.gate(tokens).float().squeeze(1)
        log_prob = torch.logaddexp(
            F.logsigmoid(gate) + log_probs.gather(1, wanted[:, None]).squeeze(1),
            F.logsigmoid(-gate) + (copied + TINY).log(),
        )
        if smoothing:
            log_prob = (1 - smoothing) * log_prob + smoothing * log_probs.mean(dim=1)
        return -rows.spread(log_prob[:, None]).sum(dim=(1, 2))

    def encode(self, sources: torch.Tensor, rows: Packing) -> torch.Tensor:
        """Encode tokens `[rows, length]`; packed, `[n, width]`."""
        tokens = self._embed(sources, rows)
        for layer in self.encoders:
            tokens = layer(tokens, rows)
        out: torch.Tensor = self.read(tokens)
        return out

    def memorise(self, sources: torch.Tensor) -> Memory:
        """The memory of sources `[rows, length]` (int64), padded, for `step`."""
        rows = Packing.of(sources)
        source = self.encode(sources, rows)
        return Memory(
            tokens=sources,
            rows=rows,
            keys_values=tuple(rows.spread(layer.remember(source)) for layer in self._decoders()),
            pointers=rows.spread(self.pointed(source)),
        )

    def step(
        self, newest: torch.Tensor, before: list[torch.Tensor], memory: Memory
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Log-probabilities of the next token of k texts for each source.

        Args:
            newest: The last token of each text, `[rows, k]` (int64).
            before: For each decoder layer the keys and values of the texts so far,
                `[rows * k, length, 2 * width]`.
            memory: The encoded sources.

        Returns:
            `[rows, k, vocabulary]`, and `before` with those of the newest tokens.
        """
        length = before[0].shape[1]
        positions = positions_of(length + 1, self.width)[length]
        tokens = self.embedding(newest.flatten()) * math.sqrt(self.width) + positions
        after = []
        for layer, kept, keys_values in zip(
            self._decoders(), before, memory.keys_values, strict=True
        ):
            tokens, kept = layer.step(tokens, kept, keys_values, memory.rows.there)
            after.append(kept)
        tokens = self.written(tokens)
        weights = self._copying(
            self.pointing(tokens).unflatten(0, newest.shape), memory.pointers, memory.rows.there
        )
        gate = self.gate(tokens).float().sigmoid().view(*newest.shape, 1)
        drawn = self._scores(tokens).softmax(dim=1).unflatten(0, newest.shape) * gate
        copied = memory.tokens[:, None].expand_as(weights)
        return drawn.scatter_add(2, copied, weights * (1 - gate)).log(), after

    def _decoders(self) -> Iterator[DecoderLayer]:
        return (layer for layer in self.decoders if isinstance(layer, DecoderLayer))

    def begin(self, texts: int) -> list[torch.Tensor]:
        """`before` of `step` for empty texts."""
        return [torch.zeros(texts, 0, 2 * self.width) for _ in self.decoders]

    def _embed(self, table: torch.Tensor, rows: Packing) -> torch.Tensor:
        """Token embeddings plus position encodings, `[n, width]`."""
        length = table.shape[1]
        tokens = self.embedding(rows.pack(table)) * math.sqrt(self.width)
        out: torch.Tensor = self.dropout(
            tokens + positions_of(length, self.width).index_select(0, rows.places % length)
        )
        return out

    def _scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits `[n, vocabulary]` (float32) of tokens that are not copied."""
        return F.linear(tokens, self.embedding.weight).float()

    def _copying(
        self, queries: torch.Tensor, pointers: torch.Tensor, there: torch.Tensor
    ) -> torch.Tensor:
        """Copy probabilities of the source's tokens: `[rows, n, length]` (float32)."""
        scores = (queries @ pointers.mT).float() / math.sqrt(self.width)
        return scores.masked_fill(~there[:, None], -torch.inf).softmax(dim=2)


def positions_of(length: int, width: int) -> torch.Tensor:
    """Sinusoidal position encodings, `[length, width]` (float32)."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10000.0) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
