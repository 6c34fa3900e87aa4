"""Chains: containers that run two linear layers, and what is elementwise between, by slices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lockstep.slices.exchanges import own_slices
from lockstep.slices.linear import SlicedColumnLinear, SlicedRowLinear
from lockstep.slices.slice_random import drop, slice_generators
from lockstep.slices.structure import chain_from, is_elementwise, is_plain

Elementwise = Callable[[torch.Tensor], torch.Tensor]


def is_chain(first: nn.Module, second: nn.Module) -> bool:
    """Whether the slices of one layer's outputs are those of the other's inputs."""
    return (
        isinstance(first, SlicedColumnLinear)
        and isinstance(second, SlicedRowLinear)
        and first.out_features == second.in_features
        and is_plain(first)
        and is_plain(second)
    )


def run_chain(
    first: SlicedColumnLinear,
    between: Sequence[Elementwise],
    second: SlicedRowLinear,
    x: torch.Tensor,
) -> torch.Tensor:
    """The outputs of the second layer. Dropout draws each slice's own random numbers."""
    parts = first.parts(x)
    generators: Sequence[torch.Generator | None] = [None] * len(parts)
    if any(_drops(each) for each in between):
        drawn = slice_generators(len(first.slices))
        generators = [drawn[index] for index in own_slices(len(drawn))]
    found = []
    for part, generator in zip(parts, generators, strict=True):
        for function in between:
            if generator is not None and _drops(function):
                part = drop(part, function.p, generator)  # type: ignore[attr-defined]
            else:
                part = function(part)
        found.append(part)
    return second.total(found)


def _drops(function: Elementwise) -> bool:
    return isinstance(function, nn.Dropout) and function.training and function.p > 0.0


class SlicedSequential(nn.Sequential):
    """`nn.Sequential` that runs its chains slice by slice.

    What is a chain is looked up in each call, so modules may be put in, replaced or taken out.
    """

    def forward(self, input: Any) -> Any:
        """As that of `nn.Sequential`."""
        modules, index = list(self), 0
        while index < len(modules):
            module, last = modules[index], _end(modules, index)
            if last > index:
                input = run_chain(module, modules[index + 1 : last], modules[last], input)  # type: ignore[arg-type]
            else:
                input = module(input)
            index = last + 1
        return input


def _end(modules: Sequence[nn.Module], first: int) -> int:
    """Where the chain ends that begins with a module; the module itself, if none does."""
    last = chain_from(modules, first) if isinstance(modules[first], SlicedColumnLinear) else None
    return last if last is not None and is_chain(modules[first], modules[last]) else first


class SlicedEncoderLayer(nn.TransformerEncoderLayer):
    """`nn.TransformerEncoderLayer` whose feed-forward part is a chain."""

    def _ff_block(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.dropout2(_feed_forward(self, x))
        return found


class SlicedDecoderLayer(nn.TransformerDecoderLayer):
    """`nn.TransformerDecoderLayer` whose feed-forward part is a chain."""

    def _ff_block(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.dropout3(_feed_forward(self, x))
        return found


def chain_draws(container: nn.Module) -> bool:
    """Whether a container has a chain that draws random numbers in training."""
    if isinstance(container, SlicedSequential):
        modules = list(container)
        ends = [(first, _end(modules, first)) for first in range(len(modules))]
        between = [module for first, last in ends for module in modules[first + 1 : last]]
    elif isinstance(container, SlicedEncoderLayer | SlicedDecoderLayer):
        between = [container.dropout] if is_chain(container.linear1, container.linear2) else []
    else:
        return False
    return any(isinstance(each, nn.Dropout) and each.p > 0.0 for each in between)


def _feed_forward(
    layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, x: torch.Tensor
) -> torch.Tensor:
    first, second = layer.linear1, layer.linear2
    if is_chain(first, second) and is_elementwise(layer.activation):
        return run_chain(first, (layer.activation, layer.dropout), second, x)  # type: ignore[arg-type]
    found: torch.Tensor = second(layer.dropout(layer.activation(first(x))))
    return found
