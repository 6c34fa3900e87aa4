"""Attention: multi-head, over packed rows in training, and with cached keys in decoding."""

from __future__ import annotations

import math

import torch
from torch import nn

from lockstep.recipes.text.packing import Packing


class Attention(nn.Module):
    """Multi-head attention: Vaswani et al., "Attention Is All You Need", 2017."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        tokens: torch.Tensor,
        memory: torch.Tensor,
        rows: Packing,
        memory_rows: Packing,
        causal: bool = False,
    ) -> torch.Tensor:
        """Attend from `tokens` `[n, width]` to their rows of `memory` `[m, width]`; `[n, width]`.

        `causal`: only to tokens up to itself, where `memory` is `tokens`.
        """
        mask = memory_rows.there[:, None, None, :]
        if causal:  # padding comes after all tokens that may be attended to
            length = mask.shape[3]
            mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        keys_values = memory_rows.spread(self.key_value(memory))
        seen = self._look(rows.spread(self.query(tokens)), keys_values, mask)
        out: torch.Tensor = self.out(rows.pack(seen))
        return out

    def extend(
        self, tokens: torch.Tensor, before: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend from the newest token of each row, `[n, width]`, to itself and those before it.

        `before` is the cache of keys and values `[n, length, 2 * width]`, returned with the new
        ones.
        """
        keys_values = torch.cat([before, self.key_value(tokens)[:, None]], dim=1)
        seen = self._look(self.query(tokens)[:, None], keys_values)
        return self.out(seen.squeeze(1)), keys_values

    def look(
        self, tokens: torch.Tensor, keys_values: torch.Tensor, there: torch.Tensor
    ) -> torch.Tensor:
        """Attend from `[rows * k, width]`, k tokens of each row, to the row's memory.

        Args:
            tokens: `[rows * k, width]`.
            keys_values: `[rows, length, 2 * width]`.
            there: `[rows, length]`, bool: false for padding of the memory.
        """
        queries = self.query(tokens).unflatten(0, (len(there), -1))
        seen = self._look(queries, keys_values, there[:, None, None, :])
        out: torch.Tensor = self.out(seen.flatten(0, 1))
        return out

    def _look(
        self,
        queries: torch.Tensor,
        keys_values: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[rows, n, width]` over `[rows, m, 2 * width]`: `[rows, n, width]`.

        `mask`: what may be attended to, as `[rows or 1, 1, n or 1, m]` (bool).
        """
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (queries, *keys_values.chunk(2, dim=2))
        )
        # Not the fused kernel: on CPUs, its backward pass in PyTorch 2.13 takes ten times as long.
        scores = (query @ key.mT).float() / math.sqrt(query.shape[3])
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        seen: torch.Tensor = scores.softmax(dim=3).to(value.dtype) @ value
        return seen.transpose(1, 2).flatten(2)
