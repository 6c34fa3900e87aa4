"""Shared state: one copy of parameters, buffers and optimizer state on each host.

The forkserver builds it once (`worker.build_state`); its forks inherit the mappings, so a worker
starts with the committed state in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lockstep.planning.blocks import Block
from lockstep.planning.byte_ranges import ByteRange
from lockstep.planning.memory_layout import Entry, Layout
from lockstep.planning.slot_map import SlotMap
from lockstep.slices.slicing import slice_numbers
from lockstep.state.buffer_rules import BufferRule
from lockstep.state.control_segment import ControlSegment
from lockstep.state.embedding_tables import Table
from lockstep.state.gradient_codecs import Codec
from lockstep.state.gradient_slots import GradientSlot, as_tensor, map_slot
from lockstep.state.optimizer_state import StateKey
from lockstep.state.state_form import UndividedState
from lockstep.system.shared_memory import Segment

PRESENT = "lockstep.present"
"""The entry that says, per block, whether its optimizer state has begun."""
REMEMBERED = "lockstep.optimizer"
"""What the entries of an undivided optimizer's options and attributes begin with."""
CHANGED = f"{REMEMBERED}/changed"
"""The entry that says of each of these whether a step has changed it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedState:
    """The model, bound to shared memory, and every view that workers need.

    Lists by parameter have the trainable ones, in the model's order.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    layout: Layout
    control: ControlSegment
    segments: dict[str, Segment]
    """`state`, `snapshot`, `control` and `slots`."""
    state_bytes: torch.Tensor
    """The state segment."""
    networked: bool
    """Whether other hosts may take part."""

    # Parameters and their optimizer state.
    params: list[nn.Parameter]
    """Their data lie in the state segment."""
    names: list[str]
    groups: list[int | None]
    """By parameter: its group in the optimizer, if it is in one."""
    tables: dict[int, Table]
    """By parameter: the embedding tables among them."""
    blocks: list[Block]
    keys: list[list[StateKey]]
    """By block: its optimizer state."""
    undivided: UndividedState | None
    """What the optimizer keeps, if one worker has to update all parameters."""
    local: list[ByteRange]
    """By shard: the bytes of the state segment that its own optimizer keeps, where a step is a
    round of local steps."""
    local_keys: list[list[StateKey]]
    """What that is, by parameter."""

    # Buffers.
    buffers: list[tuple[str, torch.Tensor]]
    """Name and the module's own (private) buffer."""
    committed: list[torch.Tensor]
    """The committed buffers, in the state segment, in the order of `buffers`."""
    buffer_rules: list[BufferRule | None]
    """How what shards leave in them becomes one value."""

    # Slots.
    slots: list[GradientSlot]
    """By shard."""
    sums: list[GradientSlot]
    """Room for the sums of subtrees that go to other hosts; none in a job on one host."""
    total: GradientSlot | None
    """Room for the sum of all shards: only where its norm is needed, or hosts may return sums."""
    restored: list[GradientSlot]
    """By group: what the codec has left of its gradients."""
    grad_offsets: list[int]
    """Bytes: where each parameter's gradient lies in a slot."""
    codec: Codec | None
    """What makes gradients small between hosts."""
    packed_offsets: list[int]
    """Bytes: where each block lies in a slot when it is made small."""
    cuts: tuple[Mapping[str, Any], ...] = ()
    """What became of each module with matrices, where they are cut into slices."""

    def view(self, name: str) -> torch.Tensor:
        """The state segment's tensor of this name."""
        return view_entry(self.state_bytes, self.layout.entry(name))

    def block_view(self, block: Block) -> torch.Tensor:
        """The block's run of its parameter in the block's shape."""
        return self._run(self.params[block.param].detach(), block)

    def _run(self, tensor: torch.Tensor, block: Block) -> torch.Tensor:
        if block.whole:
            return tensor
        return storage_run(tensor, block).view(block_shape(block, tensor.shape, self.tables))

    def state_view(self, number: int, key: StateKey) -> torch.Tensor:
        """The shared tensor behind one value of a block's optimizer state."""
        block = self.blocks[number]
        tensor = self.view(state_name(self.names[block.param], block, key))
        return self._run(tensor, block) if key.form == "like" else tensor

    def packed(self, group: int, number: int) -> torch.Tensor:
        """The bytes of a group's gradient of a block, made small."""
        assert self.codec is not None
        start, size = self.packed_offsets[number], self.blocks[number].size
        return self.restored[group].flat[start : start + self.codec.nbytes(size)]

    def note_begun(self, params: Iterable[int]) -> None:
        """Take note that other hosts have optimizer state for these parameters."""
        later = set(params)
        present = self.view(PRESENT)
        for number, block in enumerate(self.blocks):
            if block.param in later and self.groups[block.param] is not None:
                present[number] = 1

    def slot_map(self) -> SlotMap:
        """What of a slot other hosts get."""
        used = self.layout.slots_bytes
        first = min(self.packed_offsets, default=used)
        packed = ByteRange(offset=first, nbytes=used - first if self.codec else 0)
        total = len(self.slots) + len(self.sums)
        restored = total + (self.total is not None)
        numbers = slice_numbers(self.model)
        slice_of = {
            index: numbers[id(param)]
            for index, param in enumerate(self.params)
            if id(param) in numbers
        }
        return map_slot(self.slots[0], self.tables, packed, total, restored, slice_of)

    def slot_offset(self, shard: int) -> int:
        """Bytes: where in the segment of slots a shard's own optimizer leaves what it keeps."""
        slot = self.slots[shard]
        return shard * slot.flat.numel() + slot.local.data_ptr() - slot.flat.data_ptr()

    def buffer_ranges(self) -> list[ByteRange]:
        """The bytes of the state segment that hold the committed buffers."""
        entries = [entry for entry in self.layout.entries if entry.kind == "buffer"]
        return [ByteRange(offset=entry.offset, nbytes=entry.nbytes) for entry in entries]

    def remembered_ranges(self) -> list[ByteRange]:
        """The bytes of the state segment that hold an undivided optimizer's options and
        attributes."""
        return [
            ByteRange(offset=entry.offset, nbytes=entry.nbytes)
            for entry in self.layout.entries
            if self.undivided is not None and entry.name.startswith(f"{REMEMBERED}/")
        ]

    def block_ranges(self, number: int) -> list[ByteRange]:
        """The bytes of the state segment that an update of this block changes."""
        block = self.blocks[number]
        present = self.layout.entry(PRESENT).offset + number
        tensors = [self.block_view(block)]
        tensors += [self.state_view(number, key) for key in self.keys[number]]
        if self.codec is not None and block.param not in self.tables:
            for group, parity in itertools.product(range(len(self.restored)), (0, 1)):
                residual = self.view(residual_name(group, parity, self.names[block.param]))
                tensors.append(storage_run(residual, block))
        start = self.state_bytes.data_ptr()
        ranges = [
            ByteRange(
                offset=tensor.data_ptr() - start, nbytes=tensor.numel() * tensor.dtype.itemsize
            )
            for tensor in tensors
        ]
        return [*ranges, ByteRange(offset=present, nbytes=1)]


def view_entry(state_bytes: torch.Tensor, entry: Entry) -> torch.Tensor:
    """A tensor of the state segment, of which `state_bytes` are the bytes."""
    return as_tensor(state_bytes, entry.offset, entry.dtype, entry.shape, entry.stride)


def state_name(param: str, block: Block, key: StateKey) -> str:
    """The entry's name: `weight/exp_avg`, or `weight/step/65536` for what a part keeps alone."""
    name = f"{param}/{key.name}"
    return name if block.whole or key.form == "like" else f"{name}/{block.start}"


def remembered_name(key: StateKey) -> str:
    """The entry of an undivided optimizer's option or attribute."""
    return f"{REMEMBERED}/{key.name}"


def residual_name(group: int, parity: int, param: str) -> str:
    """The entry of what a group has left out of a parameter's gradients, before even steps
    (`parity` 0) or odd ones."""
    return f"lockstep.residual/{group}/{parity}/{param}"


def local_name(shard: int, param: str, key: StateKey) -> str:
    """The entry of one value that a shard's own optimizer keeps of a parameter."""
    return f"lockstep.local/{shard}/{param}/{key.name}"


def local_flags(shard: int) -> str:
    """The entry that says, per trainable parameter, whether a shard's optimizer has begun."""
    return f"lockstep.local/{shard}/{PRESENT}"


def block_shape(block: Block, shape: Sequence[int], tables: Mapping[int, Table]) -> tuple[int, ...]:
    """The shape in which the optimizer sees a block: the whole tensor's own, rows where it takes
    sparse gradients, else a vector."""
    if block.whole:
        return tuple(shape)
    table = tables.get(block.param)
    if table is not None and table.sparse:
        return block.size // table.width, table.width
    return (block.size,)


def storage_run(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """A block's run of a dense tensor, 1-D, in storage order."""
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat[block.start : block.stop]
