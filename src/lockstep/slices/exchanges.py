"""Exchanges: what slices have in common, computed alone or with a team.

Alone they are plain operations, on all slices. In a team each member has its own slices, and four
autograd functions exchange the rest. They come in pairs, each the other's gradient, so gradients of
gradients work too: `spread` and `total`, `divide` and `join`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lockstep.slices.summing import fan_out, tree_sum
from lockstep.slices.team import Team, current


def own_slices(slices: int) -> range:
    """The slices that this process computes."""
    team = current()
    return range(slices) if team is None else team.own(slices)


def spread(x: torch.Tensor, slices: int) -> list[torch.Tensor]:
    """The same tensor for each own slice, whose gradients are summed along the tree over all."""
    team = current()
    if team is None:
        return fan_out(x, slices)
    if not (x.requires_grad and torch.is_grad_enabled()):
        return [x] * len(team.own(slices))
    return list(_apply(_Spread, x, slices))


def total(parts: Sequence[torch.Tensor], slices: int) -> torch.Tensor:
    """The sum of all slices' parts along the tree; `parts` are those of the own slices."""
    if current() is None:
        return tree_sum(parts)
    found: torch.Tensor = _apply(_Total, slices, *parts)
    return found


def join(parts: Sequence[torch.Tensor], sizes: Sequence[int], dim: int) -> torch.Tensor:
    """All slices' parts side by side; `parts` are those of the own slices, `sizes` those of all."""
    if current() is None:
        return torch.cat(list(parts), dim)
    found: torch.Tensor = _apply(_Join, tuple(sizes), dim, *parts)
    return found


def divide(x: torch.Tensor, sizes: Sequence[int], dim: int) -> list[torch.Tensor]:
    """The own slices' parts of a tensor, of these sizes in all."""
    if current() is None:
        return list(x.split(list(sizes), dim))
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _parts(x, sizes, dim)
    return list(_apply(_Divide, x, tuple(sizes), dim))


@torch.compiler.disable(reason="members of a team meet")  # type: ignore[untyped-decorator]
def _apply(function: Any, *args: Any) -> Any:
    return function.apply(*args)


def _team() -> Team:
    team = current()
    assert team is not None, "a team's shard is differentiated after it was computed"
    return team


def _parts(x: torch.Tensor, sizes: Sequence[int], dim: int) -> list[torch.Tensor]:
    parts = x.split(list(sizes), dim)
    return [parts[index] for index in _team().own(len(sizes))]


class _Spread(torch.autograd.Function):
    """Backward: an exchange, the sum of all slices' gradients."""

    @staticmethod
    def forward(x: torch.Tensor, slices: int) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for _ in _team().own(slices))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.slices = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        return _apply(_Total, ctx.slices, *grads), None


class _Total(torch.autograd.Function):
    """Forward: an exchange, the sum of all slices' parts."""

    @staticmethod
    def forward(slices: int, *parts: torch.Tensor | None) -> torch.Tensor | None:
        return _team().total(parts, slices)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.slices, ctx.there = inputs[0], [part is not None for part in inputs[1:]]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, *([None] * len(ctx.there))
        grads = spread(grad, ctx.slices)
        return None, *(
            each if there else None for each, there in zip(grads, ctx.there, strict=True)
        )


class _Join(torch.autograd.Function):
    """Forward: an exchange, all slices' parts side by side."""

    @staticmethod
    def forward(sizes: tuple[int, ...], dim: int, *parts: torch.Tensor) -> torch.Tensor:
        return _team().join(parts, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.sizes, ctx.dim, ctx.count = inputs[0], inputs[1], len(inputs) - 2
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return None, None, *([None] * ctx.count)
        return None, None, *divide(grad, ctx.sizes, ctx.dim)


class _Divide(torch.autograd.Function):
    """Backward: an exchange, all slices' gradients side by side."""

    @staticmethod
    def forward(x: torch.Tensor, sizes: tuple[int, ...], dim: int) -> tuple[torch.Tensor, ...]:
        return tuple(_parts(x, sizes, dim))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.sizes, ctx.dim = inputs[1], inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return _apply(_Join, ctx.sizes, ctx.dim, *grads), None, None
