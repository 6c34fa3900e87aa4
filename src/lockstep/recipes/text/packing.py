"""Packing: rows of tokens of different lengths end to end, so that padding is not computed.

Only attention needs padded rows; everything else works on single tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PADDING = 0
"""The token that fills the ends of short rows."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Packing: the positions of tokens in a padded table."""

    there: torch.Tensor
    """`[rows, longest]`, bool: false for padding."""
    places: torch.Tensor
    """`[tokens]`: the tokens' indices in the flattened table."""

    @classmethod
    def of(cls, table: torch.Tensor) -> Packing:
        """The packing of a table of tokens `[rows, longest]` (int64)."""
        there = table != PADDING
        return cls(there=there, places=there.flatten().nonzero().squeeze(1))

    def pack(self, table: torch.Tensor) -> torch.Tensor:
        """The tokens of a table `[rows, longest, ...]`, as `[tokens, ...]`."""
        return table.flatten(0, 1).index_select(0, self.places)

    def spread(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse, with zeros for padding: `[tokens, width]` to `[rows, longest, width]`."""
        table = tokens.new_zeros(self.there.numel(), tokens.shape[1])
        return table.index_copy(0, self.places, tokens).view(*self.there.shape, -1)
