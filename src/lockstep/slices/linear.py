"""Linear layers and embeddings in slices.

Each takes the place of a plain module by becoming its class, so whoever holds the module has the
sliced one. `weight` is the plain matrix, joined from the slices: for code that reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lockstep.slices.cut_parameter import CutParameter, spans_of
from lockstep.slices.exchanges import divide, join, own_slices, spread, total
from lockstep.slices.summing import sizes_of


class MatrixSlice(nn.Module):
    """A slice of a linear layer: `weight`, and `bias` where it has its part of that."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias


def _joined(slices: nn.ModuleList, dim: int) -> torch.Tensor:
    """The plain matrix, with gradients."""
    return torch.cat([part.weight for part in _parts(slices)], dim)


def _parts(slices: nn.ModuleList) -> list[Any]:
    """The slices, each with `weight` and `bias`."""
    return list(slices)


def _own(slices: nn.ModuleList) -> list[Any]:
    """Those that this process computes: all, or in a team some of them."""
    parts = _parts(slices)
    return [parts[index] for index in own_slices(len(parts))]


class SlicedColumnLinear(nn.Linear):
    """Linear layer cut by columns of `x W^T`: each slice gives some of the outputs."""

    slices: nn.ModuleList

    @staticmethod
    def take_over(linear: nn.Linear, slices: int, cut: Cutting) -> None:
        """Become a plain linear layer's class, with slices of its parameters."""
        spans = [[span] for span in spans_of(sizes_of(linear.out_features, slices))]
        weights = cut(linear, "weight", 0, spans)
        biases: Sequence[nn.Parameter | None] = [None] * slices
        if linear.bias is not None:
            biases = cut(linear, "bias", 0, spans)
        linear.__class__ = SlicedColumnLinear
        linear.slices = nn.ModuleList(map(MatrixSlice, weights, biases))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return _joined(self.slices, 0)

    @property
    def bias(self) -> torch.Tensor | None:  # type: ignore[override]
        biases = [part.bias for part in _parts(self.slices)]
        return None if biases[0] is None else torch.cat(biases)

    def parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of each slice that this process computes."""
        return [
            F.linear(each, part.weight, part.bias)
            for each, part in zip(spread(x, len(self.slices)), _own(self.slices), strict=True)
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return join(self.parts(x), sizes_of(self.out_features, len(self.slices)), -1)


class SlicedRowLinear(nn.Linear):
    """Linear layer cut by rows of `x W^T`: each slice takes some of the inputs; the partial
    outputs are summed along the tree, then the bias is added."""

    slices: nn.ModuleList

    @staticmethod
    def take_over(linear: nn.Linear, slices: int, cut: Cutting) -> None:
        """Become a plain linear layer's class, with slices of its matrix."""
        spans = [[span] for span in spans_of(sizes_of(linear.in_features, slices))]
        weights = cut(linear, "weight", 1, spans)
        linear.__class__ = SlicedRowLinear
        linear.slices = nn.ModuleList(MatrixSlice(weight, None) for weight in weights)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return _joined(self.slices, 1)

    def total(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The outputs, from the inputs of each slice that this process computes."""
        sums = [
            F.linear(each, part.weight) for each, part in zip(parts, _own(self.slices), strict=True)
        ]
        return with_bias(total(sums, len(self.slices)), self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return self.total(divide(x, sizes_of(self.in_features, len(self.slices)), -1))


class SlicedEmbedding(nn.Embedding):
    """Embedding cut by width: each slice gives some of a row's columns."""

    slices: nn.ModuleList

    @staticmethod
    def take_over(embedding: nn.Embedding, slices: int, cut: Cutting) -> None:
        """Become a plain embedding's class, with slices of its table."""
        sizes = sizes_of(embedding.embedding_dim, slices)
        weights = cut(embedding, "weight", 1, [[span] for span in spans_of(sizes)])
        parts = nn.ModuleList()
        for weight in weights:
            part = nn.Embedding(
                embedding.num_embeddings,
                weight.shape[1],
                padding_idx=embedding.padding_idx,
                scale_grad_by_freq=embedding.scale_grad_by_freq,
                sparse=embedding.sparse,
                _weight=weight.detach(),
            )
            part.weight = weight
            parts.append(part)
        embedding.__class__ = SlicedEmbedding
        embedding.slices = parts

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        return _joined(self.slices, 1)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """`[...]` to `[..., embedding_dim]`."""
        sizes = sizes_of(self.embedding_dim, len(self.slices))
        return join([part(indices) for part in _own(self.slices)], sizes, -1)


class Cutting:
    """Cuts parameters, each once: those that are tied share their slices."""

    def __init__(self) -> None:
        self.cut: dict[int, CutParameter] = {}
        """By the id of the plain parameter, which is kept in it."""

    def __call__(
        self, module: nn.Module, name: str, dim: int, ranges: Sequence[Sequence[range]]
    ) -> Sequence[nn.Parameter]:
        """Take a parameter out of its module; its slices."""
        plain = module._parameters.pop(name)
        assert plain is not None
        if id(plain) not in self.cut:
            self.cut[id(plain)] = CutParameter.of(plain, dim, ranges)
        found = self.cut[id(plain)]
        assert found.dim == dim and found.ranges == tuple(map(tuple, ranges))
        return found.slices


def with_bias(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A bias added after the sum, in the type of the sum, as under autocast."""
    return x if bias is None else x + bias.to(x.dtype)
