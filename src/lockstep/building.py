"""Building the shared state: the model is moved to shared memory, once, in the nursery."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lockstep.codecs import CODECS, Codec
from lockstep.control import Control, ControlShape
from lockstep.embeddings import Table, find_tables
from lockstep.errors import OptimizerError, TaskError
from lockstep.exchange import most_subtrees
from lockstep.job import Parameters, Task
from lockstep.layout import Allocator, Block, Entry, Layout, Range, cut_blocks
from lockstep.local_steps import LocalSteps
from lockstep.memory import Segment, check_available
from lockstep.optim import StateKey, discover_state, initial_state, param_groups_of
from lockstep.probing import Kind, check_independent, may_cut, may_step_rows
from lockstep.slots import make_slot
from lockstep.state import (
    PRESENT,
    SharedState,
    block_shape,
    local_flags,
    local_name,
    residual_name,
    state_name,
    store_value,
)


def build(
    task: Task,
    model: nn.Module,
    *,
    shards: int,
    seats: int,
    clip: bool,
    networked: bool = False,
    compression: str = "none",
    groups: int = 0,
) -> SharedState:
    """Move the model into shared memory and lay out everything that its training needs.

    `networked`: other hosts may take part. `groups`: how many there are, where gradients are made
    small.

    Raises:
        TaskError, OptimizerError: the model or the optimizer cannot be used.
        ResourceError: there is not enough memory.
    """
    named = list(model.named_parameters())
    buffers = list(model.named_buffers())
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if not trainable:
        raise TaskError(
            "the model has no trainable parameter",
            expected="at least one parameter with requires_grad",
            fix="look at what Task.model() freezes",
        )
    optimizer = task.optimizer(Parameters(trainable))
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise OptimizerError(
            "Task.optimizer did not return an optimizer",
            expected="a torch.optim.Optimizer",
            found=repr(type(optimizer)),
            fix="return the optimizer itself",
        )
    param_groups = param_groups_of(optimizer, trainable)
    tables = find_tables(model, [parameter for _, parameter in trainable])
    sparse = [trainable[index][0] for index, table in tables.items() if table.asked]
    _check_sparse(sparse, clip=clip, local=isinstance(task, LocalSteps))
    kinds = [
        Kind(group=group, dtype=parameter.dtype, sparse=index in tables and tables[index].asked)
        for index, ((_, parameter), group) in enumerate(zip(trainable, param_groups, strict=True))
    ]
    cuttable = {kind: kind.group is not None and may_cut(optimizer, kind) for kind in set(kinds)}
    tables = {
        index: replace(table, by_rows=may_step_rows(optimizer, kinds[index]))
        for index, table in tables.items()
    }
    blocks = cut_blocks(
        [parameter.numel() for _, parameter in trainable],
        [cuttable[kind] for kind in kinds],
        {index: table.width for index, table in tables.items()},
        {index for index, table in tables.items() if table.asked},
    )
    keys = _all_keys(optimizer, trainable, param_groups, tables, blocks)
    for kind in cuttable:
        if kind.group is not None:
            check_independent(optimizer, kind)
    codec = CODECS.get(compression)
    if codec is not None:
        _check_compressible(trainable)
    local = _local_keys(task, trainable)
    layout, grad_offsets, packed, kept = _lay_out(
        model, named, trainable, buffers, tables, blocks, keys, codec, groups, shards, local
    )
    return _allocate(
        model, optimizer, layout, trainable, param_groups, blocks, keys, buffers, tables,
        grad_offsets, packed, codec, local, kept, shards=shards, seats=seats, clip=clip,
        networked=networked, groups=groups,
    )  # fmt: skip


def _local_keys(task: Task, trainable: list[tuple[str, nn.Parameter]]) -> list[list[StateKey]]:
    """What a shard's own optimizer keeps per parameter; none where there are no local steps."""
    if not isinstance(task, LocalSteps):
        return []
    optimizer = task.task.optimizer(Parameters(trainable))
    groups = param_groups_of(optimizer, trainable)
    whole = cut_blocks([p.numel() for _, p in trainable], [False] * len(trainable))
    return _all_keys(optimizer, trainable, groups, {}, whole)


def _check_compressible(trainable: Sequence[tuple[str, nn.Parameter]]) -> None:
    for name, parameter in trainable:
        if parameter.dtype != torch.float32:
            raise TaskError(
                "compression takes float32 parameters alone",
                expected="torch.float32",
                found=f"{name}: {parameter.dtype}",
                fix="leave out compression, or let autocast do what half precision is for",
            )


def _check_sparse(sparse: Sequence[str], *, clip: bool, local: bool) -> None:
    """Refuse what does not work with sparse gradients, of the parameters of these names."""
    if clip and sparse:
        raise OptimizerError(
            "clip_grad_norm does not work with sparse gradients",  # as in PyTorch
            expected="dense gradients, or no limit of their norm",
            found=f"sparse=True in the module of {', '.join(sparse)}",
            fix="leave out clip_grad_norm, or build the module with sparse=False",
        )
    if local and sparse:
        raise OptimizerError(
            "local_steps does not work with sparse gradients",
            expected="dense gradients, or an exchange after every step",
            found=f"sparse=True in the module of {', '.join(sparse)}",
            fix="leave out local_steps, since only touched rows travel anyway, or build the module "
            "with sparse=False",
        )


def _all_keys(
    optimizer: torch.optim.Optimizer,
    trainable: list[tuple[str, nn.Parameter]],
    groups: list[int | None],
    tables: dict[int, Table],
    blocks: list[Block],
) -> list[list[StateKey]]:
    found: dict[Any, list[StateKey]] = {}
    keys: list[list[StateKey]] = []
    for block in blocks:
        parameter, group = trainable[block.param][1], groups[block.param]
        if group is None:
            keys.append([])
            continue
        shape = block_shape(block, parameter.shape, tables)
        sparse = block.param in tables and tables[block.param].asked
        kind = (group, shape, sparse, parameter.dtype, bool(optimizer.state.get(parameter)))
        if kind not in found:
            stand_in = nn.Parameter(torch.zeros(shape, dtype=parameter.dtype))
            start = initial_state(optimizer, parameter, block, shape)
            found[kind] = discover_state(optimizer, group, stand_in, start, sparse=sparse)
        keys.append(found[kind])
    return keys


def _lay_out(
    model: nn.Module,
    named: list[tuple[str, nn.Parameter]],
    trainable: list[tuple[str, nn.Parameter]],
    buffers: list[tuple[str, torch.Tensor]],
    tables: dict[int, Table],
    blocks: list[Block],
    keys: list[list[StateKey]],
    codec: Codec | None,
    groups: int,
    shards: int,
    local: list[list[StateKey]],
) -> tuple[Layout, list[int], list[int], Range]:
    """Give every tensor its place: in the state segment, and in a slot; where gradients lie in a
    slot, where blocks do that are made small, and where what the shard's own optimizer keeps."""
    space = Allocator()
    entries: list[Entry] = []

    def add(name: str, kind: Any, dtype: torch.dtype, shape: Any, stride: Any) -> None:
        nbytes = math.prod(shape) * dtype.itemsize
        entries.append(
            Entry(
                name=name, kind=kind, dtype=str(dtype).removeprefix("torch."), shape=tuple(shape),
                stride=tuple(stride), offset=space.take(nbytes), nbytes=nbytes,
            )
        )  # fmt: skip

    slot = Allocator()
    offsets = []
    for name, parameter in named:
        add(name, "param", parameter.dtype, parameter.shape, dense_stride(parameter))
    for _, parameter in trainable:
        offsets.append(slot.take(parameter.numel() * parameter.dtype.itemsize))
    for name, buffer in buffers:
        add(name, "buffer", buffer.dtype, buffer.shape, dense_stride(buffer))
        slot.take(buffer.numel() * buffer.dtype.itemsize)
    for table in tables.values():
        slot.take(8 * (1 + table.rows))
    for block, name, key in _in_state_order(trainable, blocks, keys):
        parameter = trainable[block.param][1]
        add(name, "optim", key.dtype, *_form(parameter, key))
    add(PRESENT, "flag", torch.uint8, (len(blocks),), (1,))
    before = space.used
    for shard in range(shards if local else 0):
        add(local_flags(shard), "local", torch.uint8, (len(trainable),), (1,))
        for (name, parameter), shard_keys in zip(trainable, local, strict=True):
            for key in shard_keys:
                add(local_name(shard, name, key), "local", key.dtype, *_form(parameter, key))
    size = (space.used - before) // shards
    kept = Range(offset=slot.take(size), nbytes=size)
    packed: list[int] = []
    if codec is not None:
        sizes = [0 if b.param in tables else codec.nbytes(b.size) for b in blocks]
        packed = [slot.take(size) for size in sizes]
        for group, parity in itertools.product(range(groups), (0, 1)):
            for index, (name, parameter) in enumerate(trainable):
                if index not in tables:
                    full = residual_name(group, parity, name)
                    add(full, "residual", torch.float32, parameter.shape, dense_stride(parameter))
    layout = Layout(
        entries=tuple(entries),
        blocks=tuple(blocks),
        trainable=tuple(name for name, _ in trainable),
        state_bytes=space.used,
        slots_bytes=slot.used,
        exported=_exported(model, [*named, *buffers]),
    )
    return layout, offsets, packed, kept


def _form(parameter: nn.Parameter, key: StateKey) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and stride of what an optimizer keeps of a parameter."""
    if key.form == "like":
        return tuple(parameter.shape), dense_stride(parameter)
    return key.shape, contiguous_stride(key.shape)


def _in_state_order(
    trainable: list[tuple[str, nn.Parameter]], blocks: list[Block], keys: list[list[StateKey]]
) -> list[tuple[Block, str, StateKey]]:
    """Optimizer state by key, then by parameter, so that an owner's state is a few long runs."""
    seen: dict[str, dict[str, tuple[Block, str, StateKey]]] = {}
    for block, block_keys in zip(blocks, keys, strict=True):
        for key in block_keys:
            name = state_name(trainable[block.param][0], block, key)
            seen.setdefault(key.name, {}).setdefault(name, (block, name, key))
    return [item for by_name in seen.values() for item in by_name.values()]


def _exported(
    model: nn.Module, tensors: list[tuple[str, torch.Tensor]]
) -> tuple[tuple[str, str], ...]:
    """Which entry each key of the model's state dict stands for."""
    names = {id(tensor): name for name, tensor in tensors}
    return tuple(
        (key, names[id(value)])
        for key, value in model.state_dict(keep_vars=True).items()
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


def _allocate(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    layout: Layout,
    trainable: list[tuple[str, nn.Parameter]],
    param_groups: list[int | None],
    blocks: list[Block],
    keys: list[list[StateKey]],
    buffers: list[tuple[str, torch.Tensor]],
    tables: dict[int, Table],
    grad_offsets: list[int],
    packed: list[int],
    codec: Codec | None,
    local_keys: list[list[StateKey]],
    kept: Range,
    *,
    shards: int,
    seats: int,
    clip: bool,
    networked: bool,
    groups: int,
) -> SharedState:
    """Create the segments, move the initial values in and bind the model to them."""
    starts = [
        initial_state(
            optimizer,
            trainable[block.param][1],
            block,
            block_shape(block, trainable[block.param][1].shape, tables),
        )
        if block_keys
        else {}
        for block, block_keys in zip(blocks, keys, strict=True)
    ]
    shape = ControlShape(shards=shards, seats=seats, params=len(trainable))
    slot_bytes = layout.slots_bytes
    spare = most_subtrees(shards) if networked else 0
    restored = 0
    if codec is not None:
        spare, restored = groups, groups
    totals = int(clip or networked)
    copies = shards + spare + totals + restored
    check_available("the run's shared memory", 2 * layout.state_bytes + copies * slot_bytes)
    segments = {
        "state": Segment.create("state", layout.state_bytes),
        "slots": Segment.create("slots", copies * slot_bytes),
        "base": Segment.create("base", layout.state_bytes),
        "control": Segment.create("control", shape.nbytes()),
    }
    state_flat = torch.frombuffer(segments["state"].map, dtype=torch.uint8)
    slots_flat = torch.frombuffer(segments["slots"].map, dtype=torch.uint8)
    shared = SharedState(
        model=model,
        optimizer=optimizer,
        layout=layout,
        params=[parameter for _, parameter in trainable],
        names=[name for name, _ in trainable],
        groups=param_groups,
        blocks=blocks,
        keys=keys,
        buffers=buffers,
        committed=[],
        tables=tables,
        slots=[],
        sums=[],
        networked=networked,
        grad_offsets=grad_offsets,
        codec=codec,
        packed_offsets=packed,
        restored=[],
        local=_local_ranges(layout, shards if local_keys else 0, kept.nbytes),
        local_keys=local_keys,
        total=None,
        state_bytes=state_flat,
        segments=segments,
        control=Control(segments["control"], shape),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            home = shared.view(name)
            home.copy_(parameter)
            parameter.data = home
        for name, buffer in buffers:
            shared.committed.append(shared.view(name).copy_(buffer))
        for number, start in enumerate(starts):
            _store_start(shared, number, start)
    slots = [
        make_slot(flat, shared.params, grad_offsets, shared.committed, tables, kept)
        for flat in slots_flat[: copies * slot_bytes].split(slot_bytes)
    ]
    shared.slots, shared.sums = slots[:shards], slots[shards : shards + spare]
    shared.total = slots[shards + spare] if totals else None
    shared.restored = slots[shards + spare + totals :]
    shared.control.shard_done[:] = -1
    return shared


def _local_ranges(layout: Layout, shards: int, nbytes: int) -> list[Range]:
    """By shard: where what its own optimizer keeps begins, and how much that is."""
    places = [layout.apart("local", [shard])[0] for shard in range(shards)]
    return [Range(offset=place.offset, nbytes=nbytes) for place in places]


def _store_start(shared: SharedState, number: int, start: dict[str, Any]) -> None:
    """Put the state that the optimizer's constructor made for a block in its place."""
    if not start:
        return
    for key in shared.keys[number]:
        store_value(shared.state_view(number, key), start[key.name])
    shared.view(PRESENT)[number] = 1
