"""Cut parameter: a parameter of the plain model, and the slices that take its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lockstep.planning.memory_layout import JoinedTensor, Piece


@dataclass(frozen=True, kw_only=True, eq=False)
class CutParameter:
    """A parameter and its slices."""

    plain: nn.Parameter
    dim: int
    """Along which it is cut."""
    ranges: tuple[tuple[range, ...], ...]
    """By slice: which of its elements along the dimension."""
    slices: tuple[nn.Parameter, ...]

    @staticmethod
    def of(plain: nn.Parameter, dim: int, ranges: Sequence[Sequence[range]]) -> CutParameter:
        """Cut a parameter. Slices are compact copies, with gradients where it has some."""
        spans = tuple(tuple(each) for each in ranges)
        slices = tuple(
            nn.Parameter(part, requires_grad=plain.requires_grad)
            for part in _cut(plain.detach(), dim, spans)
        )
        return CutParameter(plain=plain, dim=dim, ranges=spans, slices=slices)

    def cut(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """A tensor of the parameter's shape, cut as it is."""
        return _cut(tensor, self.dim, self.ranges)

    def joined(self, key: str, names: Mapping[int, str]) -> JoinedTensor:
        """How the plain tensor is made of the slices. `names`: those of parameters, by id."""
        found: list[tuple[int, Piece]] = []
        for part, spans in zip(self.slices, self.ranges, strict=True):
            at = 0
            for span in spans:
                piece = Piece(entry=names[id(part)], start=at, stop=at + len(span))
                found.append((span.start, piece))
                at += len(span)
        pieces = tuple(piece for _, piece in sorted(found, key=lambda each: each[0]))
        return JoinedTensor(key=key, dim=self.dim, pieces=pieces)


def spans_of(sizes: Sequence[int], first: int = 0) -> list[range]:
    """Consecutive ranges of these sizes."""
    spans = []
    for size in sizes:
        spans.append(range(first, first + size))
        first += size
    return spans


def _cut(tensor: torch.Tensor, dim: int, ranges: Sequence[Sequence[range]]) -> list[torch.Tensor]:
    return [
        torch.cat([tensor.narrow(dim, span.start, len(span)) for span in spans], dim)
        for spans in ranges
    ]
