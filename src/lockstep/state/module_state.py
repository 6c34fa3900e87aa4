"""Module state that a forward pass may change: buffers and training modes.

Every shard starts from the committed buffers and leaves its own, and every shard starts in the
same modes: what one leaves behind must not reach the next that this worker happens to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lockstep.errors import TaskError


@dataclass(frozen=True, kw_only=True)
class _Buffer:
    name: str
    module: nn.Module
    leaf: str
    own: torch.Tensor
    """The module's, as it was when the model was built."""
    form: tuple[torch.Size, torch.dtype]
    """That of then: a forward pass may change `own` itself."""


class PrivateBuffers:
    """The model's buffers as this worker's forward passes see them.

    They are looked up in their modules each time: a forward pass may put another tensor instead of
    one (`self.count = self.count + 1`).
    """

    def __init__(self, model: nn.Module, buffers: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._buffers: list[_Buffer] = []
        for name, own in buffers:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            form = (own.shape, own.dtype)
            buffer = _Buffer(name=name, module=module, leaf=leaf, own=own, form=form)
            self._buffers.append(buffer)
        self._empty = [
            (module, leaf)
            for module in model.modules()
            for leaf, value in module._buffers.items()
            if value is None
        ]

    def restore(self, committed: Sequence[torch.Tensor]) -> None:
        """Set every buffer to its committed value.

        Raises:
            TaskError: one has another shape or type than it had at the start.
        """
        for buffer, value in zip(self._buffers, committed, strict=True):
            own = buffer.own
            if (own.shape, own.dtype) != buffer.form:  # as `resize_` leaves it
                raise _changed(buffer, own)
            buffer.module._buffers[buffer.leaf] = own.copy_(value)

    def values(self) -> list[torch.Tensor]:
        """What the forward pass has left.

        Raises:
            TaskError: a buffer has another shape or type than it had at the start, or was None.
        """
        for module, leaf in self._empty:
            value = module._buffers[leaf]
            if value is not None:
                raise TaskError(
                    f"the forward pass gave a value to buffer {leaf}, which was None",
                    expected="buffers that are there when the model is built",
                    found=f"{tuple(value.shape)} {value.dtype}",
                    fix="register it with its final shape when the model is built",
                )
        found: list[torch.Tensor] = []
        for buffer in self._buffers:
            value = buffer.module._buffers[buffer.leaf]
            if value is None or (value.shape, value.dtype) != buffer.form:
                raise _changed(buffer, value)
            found.append(value)
        return found

    def save(self, targets: Sequence[torch.Tensor]) -> None:
        """Copy what the forward pass has left into a slot."""
        for value, target in zip(self.values(), targets, strict=True):
            target.copy_(value)


def _changed(buffer: _Buffer, value: torch.Tensor | None) -> TaskError:
    shape, dtype = buffer.form
    return TaskError(
        f"the forward pass changed the shape or type of buffer {buffer.name}",
        expected=f"{tuple(shape)} {dtype}",
        found="None" if value is None else f"{tuple(value.shape)} {value.dtype}",
        fix="give it its final shape when the model is built",
    )


class Modes:
    """Which of the model's modules are in training mode, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]

    def restore(self) -> None:
        """Put the modules back into these modes."""
        for module, training in self._modes:
            if module.training is not training:
                module.training = training
