"""Allocation: the offset of every tensor of a run, in the state segment and in each slot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lockstep.planning.blocks import Block
from lockstep.planning.byte_ranges import ByteRange
from lockstep.planning.memory_layout import Allocator, Entry, JoinedTensor, Kind, Layout
from lockstep.state.buffer_rules import BufferRule
from lockstep.state.embedding_tables import Table
from lockstep.state.gradient_codecs import Codec
from lockstep.state.optimizer_state import StateKey
from lockstep.state.shared_state import (
    CHANGED,
    PRESENT,
    local_flags,
    local_name,
    remembered_name,
    residual_name,
    state_name,
)
from lockstep.state.state_form import UndividedState


@dataclass(frozen=True, kw_only=True)
class StateContents:
    """What a run's shared memory has to hold."""

    model: nn.Module
    trainable: list[tuple[str, nn.Parameter]]
    buffers: list[tuple[str, torch.Tensor]]
    buffer_rules: list[BufferRule | None]
    blocks: list[Block]
    keys: list[list[StateKey]]
    """Per block: its optimizer's state."""
    undivided: UndividedState | None
    """What the optimizer keeps, if one worker has to update all parameters."""
    tables: dict[int, Table]
    """By trainable parameter."""
    shards: int
    local_keys: list[list[StateKey]]
    """Per trainable parameter: what a shard's own optimizer keeps; empty without local steps."""
    groups: int
    """Of shards: those whose gradients are made small together."""
    codec: Codec | None
    """What makes them small."""
    joined: tuple[JoinedTensor, ...] = ()
    """What of the plain state dict lies in slices."""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Where it all lies. `layout` has the state segment, and the size of a slot."""

    layout: Layout
    grads: list[int]
    """Bytes into a slot, per trainable parameter: its gradient."""
    packed: list[int]
    """Bytes into a slot, per block: its gradient made small; empty without a codec."""
    kept: ByteRange
    """Of a slot: what the shard's own optimizer keeps."""
    local: list[ByteRange]
    """By shard: the same in the state segment; empty without local steps."""


def allocate(contents: StateContents) -> Allocation:
    """Give every tensor its offset."""
    space, slot = _Space(), Allocator()
    named = list(contents.model.named_parameters())
    for name, parameter in named:
        space.add_like(name, "param", parameter)
    for name, buffer in contents.buffers:
        space.add_like(name, "buffer", buffer)
    grads = [slot.allocate(_nbytes(parameter)) for _, parameter in contents.trainable]
    for _, buffer in contents.buffers:
        slot.allocate(_nbytes(buffer))
    for table in contents.tables.values():
        slot.allocate(8 * (1 + table.rows))
    _add_optimizer_state(space, contents)
    local = _add_local_state(space, contents)
    size = local[0].nbytes if local else 0  # the same for each shard
    kept = ByteRange(offset=slot.allocate(size), nbytes=size)
    packed = _add_packed(space, slot, contents, contents.codec) if contents.codec else []
    layout = Layout(
        entries=tuple(space.entries),
        blocks=tuple(contents.blocks),
        trainable=tuple(name for name, _ in contents.trainable),
        state_bytes=space.used,
        slots_bytes=slot.used,
        exported=_exported(contents, [*named, *contents.buffers]),
        joined=contents.joined,
    )
    return Allocation(layout=layout, grads=grads, packed=packed, kept=kept, local=local)


class _Space(Allocator):
    """The state segment, as far as it is filled."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Entry] = []

    def add(
        self,
        name: str,
        kind: Kind,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> None:
        nbytes = math.prod(shape) * dtype.itemsize
        self.entries.append(
            Entry(
                name=name, kind=kind, dtype=str(dtype).removeprefix("torch."), shape=shape,
                stride=stride, offset=self.allocate(nbytes), nbytes=nbytes,
            )
        )  # fmt: skip

    def add_like(self, name: str, kind: Kind, tensor: torch.Tensor) -> None:
        self.add(name, kind, tensor.dtype, tuple(tensor.shape), dense_stride(tensor))

    def add_value(self, name: str, kind: Kind, parameter: nn.Parameter, key: StateKey) -> None:
        """Add what an optimizer keeps of a parameter."""
        if key.form == "like":
            self.add(name, kind, key.dtype, tuple(parameter.shape), dense_stride(parameter))
        else:
            stride = key.stride or contiguous_stride(key.shape)
            self.add(name, kind, key.dtype, key.shape, stride)


def _add_optimizer_state(space: _Space, contents: StateContents) -> None:
    """By key, then by parameter, so that an owner's state is a few long runs."""
    found: dict[str, dict[str, tuple[nn.Parameter, StateKey]]] = {}
    for block, keys in zip(contents.blocks, contents.keys, strict=True):
        param, parameter = contents.trainable[block.param]
        for key in keys:
            name = state_name(param, block, key)  # one for all blocks, where these share it
            found.setdefault(key.name, {}).setdefault(name, (parameter, key))
    for by_name in found.values():
        for name, (parameter, key) in by_name.items():
            space.add_value(name, "optim", parameter, key)
    space.add(PRESENT, "flag", torch.uint8, (len(contents.blocks),), (1,))
    if contents.undivided is not None:
        for key in contents.undivided.remembered_keys:
            stride = key.stride or contiguous_stride(key.shape)
            space.add(remembered_name(key), "optim", key.dtype, key.shape, stride)
        space.add(CHANGED, "flag", torch.uint8, (len(contents.undivided.remembered),), (1,))


def _add_local_state(space: _Space, contents: StateContents) -> list[ByteRange]:
    """What the shards' own optimizers keep; by shard, where that is."""
    ranges = []
    for shard in range(contents.shards if contents.local_keys else 0):
        start = space.used
        space.add(local_flags(shard), "local", torch.uint8, (len(contents.trainable),), (1,))
        for (name, parameter), keys in zip(contents.trainable, contents.local_keys, strict=True):
            for key in keys:
                space.add_value(local_name(shard, name, key), "local", parameter, key)
        ranges.append(ByteRange(offset=start, nbytes=space.used - start))
    return ranges


def _add_packed(space: _Space, slot: Allocator, contents: StateContents, codec: Codec) -> list[int]:
    """Gradients that are made small, and what of them is left out; by block, where they are."""
    for group, parity in itertools.product(range(contents.groups), (0, 1)):
        for index, (name, parameter) in enumerate(contents.trainable):
            if index not in contents.tables:
                shape, stride = tuple(parameter.shape), dense_stride(parameter)
                full = residual_name(group, parity, name)
                space.add(full, "residual", torch.float32, shape, stride)
    sizes = [0 if b.param in contents.tables else codec.nbytes(b.size) for b in contents.blocks]
    return [slot.allocate(size) for size in sizes]


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _exported(
    contents: StateContents, tensors: list[tuple[str, torch.Tensor]]
) -> tuple[tuple[str, str], ...]:
    """Which entry each key of the model's state dict stands for, slices left out."""
    sliced = {piece.entry for joined in contents.joined for piece in joined.pieces}
    names = {id(tensor): name for name, tensor in tensors if name not in sliced}
    return tuple(
        (key, names[id(value)])
        for key, value in contents.model.state_dict(keep_vars=True).items()
        if id(value) in names
    )


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """The row-major stride of a shape, in elements."""
    strides = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's own stride where it is a permutation of row-major (as channels-last is)."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return contiguous_stride(tensor.shape)
        expected *= size
    return tuple(tensor.stride())
