"""Private state: the same views as a host's shared state, in memory of one worker.

Offsets are those of the host's segments, so that a run of bytes is the same in both.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lockstep.state.gradient_slots import GradientSlot
from lockstep.state.shared_state import SharedState, view_entry


def private_state(
    shared: SharedState, state_bytes: torch.Tensor, slots_bytes: torch.Tensor
) -> SharedState:
    """Views of these bytes, as long as the segments; the model's parameters are bound to them.

    Codecs, and what shards' own optimizers keep, stay in the host's segments.
    """
    with torch.no_grad():
        for name, parameter in shared.model.named_parameters():
            parameter.data = view_entry(state_bytes, shared.layout.entry(name))
    slots, sums = _moved(shared.slots, slots_bytes), _moved(shared.sums, slots_bytes)
    return replace(
        shared,
        state_bytes=state_bytes,
        committed=[_view(buffer, state_bytes) for buffer in shared.committed],
        slots=slots,
        sums=sums,
        total=None if shared.total is None else _moved([shared.total], slots_bytes)[0],
    )


def _moved(slots: list[GradientSlot], to: torch.Tensor) -> list[GradientSlot]:
    return [
        GradientSlot(
            grads=[_view(gradient, to) for gradient in slot.grads],
            buffers=[_view(buffer, to) for buffer in slot.buffers],
            row_indices={index: _view(rows, to) for index, rows in slot.row_indices.items()},
            local=_view(slot.local, to),
            flat=_view(slot.flat, to),
        )
        for slot in slots
    ]


def _view(tensor: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """The view that a segment's tensor is, of other bytes of the same size."""
    start = tensor.storage_offset() * tensor.dtype.itemsize
    room = to[start : start + tensor.numel() * tensor.dtype.itemsize].view(tensor.dtype)
    return room.as_strided(tensor.shape, tensor.stride())
