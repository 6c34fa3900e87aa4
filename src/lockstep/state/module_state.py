"""Module state that a forward pass may change: buffers and training modes.

Every shard starts from the committed buffers and leaves its own, and every shard starts in the
same modes: what one leaves behind must not reach the next that this worker happens to compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lockstep.errors import TaskError


class PrivateBuffers:
    """The model's buffers as this worker's forward passes see them.

    They are looked up in their modules each time: a forward pass may put another tensor instead of
    one (`self.count = self.count + 1`).
    """

    def __init__(self, model: nn.Module, buffers: Sequence[tuple[str, torch.Tensor]]) -> None:
        self._buffers: list[tuple[nn.Module, str, torch.Tensor]] = []
        for name, own in buffers:
            path, _, leaf = name.rpartition(".")
            self._buffers.append((model.get_submodule(path), leaf, own))
        self._empty = [
            (module, leaf)
            for module in model.modules()
            for leaf, value in module._buffers.items()
            if value is None
        ]

    def restore(self, committed: Sequence[torch.Tensor]) -> None:
        """Set every buffer to its committed value."""
        for (module, leaf, own), value in zip(self._buffers, committed, strict=True):
            module._buffers[leaf] = own.copy_(value)

    def save(self, targets: Sequence[torch.Tensor]) -> None:
        """Copy what the forward pass has left into a slot.

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
        for (module, leaf, own), target in zip(self._buffers, targets, strict=True):
            value = module._buffers[leaf]
            if value is None or value.shape != own.shape or value.dtype != own.dtype:
                raise TaskError(
                    f"the forward pass changed the shape or type of buffer {leaf}",
                    expected=f"{tuple(own.shape)} {own.dtype}",
                    found="None" if value is None else f"{tuple(value.shape)} {value.dtype}",
                    fix="give it its final shape when the model is built",
                )
            target.copy_(value)


class Modes:
    """Which of the model's modules are in training mode, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._modes = [(module, module.training) for module in model.modules()]

    def restore(self) -> None:
        """Put the modules back into these modes."""
        for module, training in self._modes:
            if module.training is not training:
                module.training = training
