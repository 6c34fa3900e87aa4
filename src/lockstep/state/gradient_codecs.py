"""Gradient codecs: compress gradients for a slow link. Pure functions of float32 numbers.

    bf16   half the bytes: each number rounded to bfloat16, to nearest even
    int8   a quarter: each run of 128 numbers has a scale of its own
    topk   a fiftieth: of each block, the hundredth part that is largest, with its indices

A block's bytes are as many whatever is in it. What a codec leaves out is added to the next
gradient (error feedback: Seide et al., Interspeech 2014; for top-k Stich et al., NeurIPS 2018).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

RUN = 128
"""Numbers that share a scale."""
SHARE = 0.01
"""Of the numbers of a block, the part that `topk` keeps."""


class Codec(Protocol):
    """Numbers are float32, 1-D, and contiguous; bytes are uint8, 1-D, and aligned to 4."""

    def nbytes(self, size: int) -> int:
        """How many bytes so many numbers take."""

    def encode(self, numbers: torch.Tensor, into: torch.Tensor) -> None:
        """Write the numbers' bytes."""

    def decode(self, data: torch.Tensor, into: torch.Tensor) -> None:
        """Write the numbers that are left."""


class Bf16:
    """Rounds to bfloat16."""

    def nbytes(self, size: int) -> int:
        return 2 * size

    def encode(self, numbers: torch.Tensor, into: torch.Tensor) -> None:
        into.view(torch.bfloat16).copy_(numbers)

    def decode(self, data: torch.Tensor, into: torch.Tensor) -> None:
        into.copy_(data.view(torch.bfloat16))


class Int8:
    """Rounds to 255 levels between a run's extremes."""

    def nbytes(self, size: int) -> int:
        return 4 * math.ceil(size / RUN) + size

    def encode(self, numbers: torch.Tensor, into: torch.Tensor) -> None:
        scales, levels = self._parts(into, numbers.numel())
        for scale, level, run in self._runs(scales, levels, numbers):
            torch.amax(run.abs(), dim=1, out=scale)
            scale /= 127
            safe = torch.where(scale > 0, scale, torch.ones_like(scale))
            level.copy_(torch.round(run / safe[:, None]))

    def decode(self, data: torch.Tensor, into: torch.Tensor) -> None:
        scales, levels = self._parts(data, into.numel())
        for scale, level, run in self._runs(scales, levels, into):
            torch.mul(level, scale[:, None], out=run)

    @staticmethod
    def _parts(data: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        cut = 4 * math.ceil(size / RUN)
        return data[:cut].view(torch.float32), data[cut : cut + size].view(torch.int8)

    @staticmethod
    def _runs(
        scales: torch.Tensor, levels: torch.Tensor, numbers: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """The whole runs at once, and then what is left over."""
        size = numbers.numel()
        whole = size // RUN
        found = []
        if whole:
            shape, stop = (whole, RUN), whole * RUN
            found.append((scales[:whole], levels[:stop].view(shape), numbers[:stop].view(shape)))
        if size % RUN:
            start = whole * RUN
            found.append((scales[whole:], levels[start:][None], numbers[start:][None]))
        return found


class TopK:
    """Keeps the largest, in the order of their indices."""

    def nbytes(self, size: int) -> int:
        return 8 * self._kept(size)

    def encode(self, numbers: torch.Tensor, into: torch.Tensor) -> None:
        kept = self._kept(numbers.numel())
        indices = numbers.abs().topk(kept, sorted=False).indices.sort().values
        into[: 4 * kept].view(torch.int32).copy_(indices)
        torch.index_select(numbers, 0, indices, out=into[4 * kept :].view(torch.float32))

    def decode(self, data: torch.Tensor, into: torch.Tensor) -> None:
        kept = self._kept(into.numel())
        into.zero_()
        indices, values = data[: 4 * kept].view(torch.int32), data[4 * kept :].view(torch.float32)
        into.index_copy_(0, indices.long(), values)

    @staticmethod
    def _kept(size: int) -> int:
        return max(1, math.ceil(SHARE * size))


CODECS: dict[str, Codec] = {"bf16": Bf16(), "int8": Int8(), "topk": TopK()}
