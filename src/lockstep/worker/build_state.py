"""Building the shared state: the model is moved to shared memory, once, in the forkserver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lockstep.errors import OptimizerError, TaskError
from lockstep.job.task import Parameters, Task
from lockstep.optim.introspection import discover_state, initial_state, param_groups_of
from lockstep.optim.known_optimizers import (
    Rule,
    is_known,
    name_of,
    part_of,
    rule_of,
)
from lockstep.optim.local_sgd import LocalSGD
from lockstep.optim.probes import Kind, check_independent, may_cut, may_step_rows
from lockstep.optim.sliced_parameters import NOTHING_SLICED, slice_parameters
from lockstep.optim.undivided_trial import try_undivided
from lockstep.planning.blocks import Block, cut_blocks
from lockstep.planning.memory_layout import Layout
from lockstep.planning.reduction_tree import most_subtrees
from lockstep.state.allocation import Allocation, StateContents, allocate
from lockstep.state.buffer_rules import rules_of
from lockstep.state.control_segment import ControlSegment, ControlShape
from lockstep.state.embedding_tables import Table, find_tables
from lockstep.state.gradient_codecs import CODECS
from lockstep.state.gradient_slots import make_slot
from lockstep.state.optimizer_state import StateKey, store_value
from lockstep.state.shared_state import PRESENT, SharedState, block_shape, view_entry
from lockstep.state.state_form import UndividedState
from lockstep.system.machine import check_available
from lockstep.system.shared_memory import Segment


def build(
    task: Task,
    model: nn.Module,
    *,
    shards: int,
    max_workers: int,
    clip: bool,
    networked: bool = False,
    compression: str = "none",
    groups: int = 0,
    ownership: str = "replicated",
    slices: int = 1,
    slice_plan: Mapping[str, str] | None = None,
    device: str = "cpu",
) -> SharedState:
    """Move the model into shared memory and lay out everything that its training needs.

    `networked`: other hosts may take part. `groups`: how many there are, where gradients are made
    small. `ownership`, `slices`, `slice_plan`, `device`: as in the job.

    Raises:
        TaskError, OptimizerError: the model or the optimizer cannot be used.
        ResourceError: there is not enough memory.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = _optimizer_of(task, trainable)
    sliced = NOTHING_SLICED
    if slices > 1:
        sliced = slice_parameters(task, model, optimizer, slices, slice_plan)
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    param_groups = param_groups_of(optimizer, trainable)
    tables = find_tables(model, [parameter for _, parameter in trainable])
    if tables and device != "cpu":
        raise _no_tables(device, [trainable[index][0] for index in tables])
    sparse = [trainable[index][0] for index, table in tables.items() if table.sparse]
    _check_sparse(sparse, clip=clip, local=isinstance(task, LocalSGD))
    kinds = [
        Kind(group=group, dtype=parameter.dtype, sparse=index in tables and tables[index].sparse)
        for index, ((_, parameter), group) in enumerate(zip(trainable, param_groups, strict=True))
    ]
    rule = rule_of(optimizer)
    undivided: UndividedState | None = None
    if rule == "together":
        _check_ownership(optimizer, ownership)
        if device == "cuda":
            raise _not_on_gpus(optimizer)
        undivided = try_undivided(optimizer, trainable, sparse)
    cuttable = {kind: _may_cut(optimizer, kind, rule) for kind in set(kinds)}
    tables = {
        index: replace(table, by_rows=undivided is None and may_step_rows(optimizer, kinds[index]))
        for index, table in tables.items()
    }
    blocks = cut_blocks(
        [parameter.numel() for _, parameter in trainable],
        [cuttable[kind] for kind in kinds],
        {index: table.width for index, table in tables.items()},
        {index for index, table in tables.items() if table.sparse},
    )
    if undivided is not None:
        keys = [undivided.forms[block.param].keys for block in blocks]
    else:
        keys = _all_keys(optimizer, trainable, param_groups, tables, blocks)
    if undivided is None and not is_known(optimizer):
        for kind in cuttable:
            if kind.group is not None:
                check_independent(optimizer, kind)
    codec = CODECS.get(compression)
    if codec is not None:
        _check_compressible(trainable)
    contents = StateContents(
        model=model,
        trainable=trainable,
        buffers=list(model.named_buffers()),
        buffer_rules=rules_of(task, model),
        blocks=blocks,
        keys=keys,
        undivided=undivided,
        tables=tables,
        shards=shards,
        local_keys=_local_keys(task, trainable),
        groups=groups,
        codec=codec,
        joined=sliced.joined,
    )
    if ownership == "slices" and not sliced.joined:
        raise _nothing_to_share(slices)
    return _allocate(
        contents, allocate(contents), optimizer, param_groups, sliced.cuts,
        max_workers=max_workers, clip=clip, networked=networked,
        parted=networked and ownership == "slices",
    )  # fmt: skip


def _nothing_to_share(slices: int) -> TaskError:
    return TaskError(
        "hosts are to have slices of the model, and none of its matrices is cut",
        expected=f"matrices that can be cut into {slices} slices",
        found="none",
        fix="see with `lockstep plan` why each stays whole; or leave out ownership",
    )


def _no_tables(device: str, names: Sequence[str]) -> TaskError:
    return TaskError(
        f"large embedding tables do not go with device: {device} so far",
        expected="embeddings whose gradients are small enough to be dense, or device = cpu",
        found=", ".join(names),
        fix="leave device out; or smaller tables, without sparse=True",
    )


def _not_on_gpus(optimizer: torch.optim.Optimizer) -> OptimizerError:
    return OptimizerError(
        f"{name_of(optimizer)} is not known to update tensors one by one: what it keeps is tried "
        "on the CPU, and not moved to a GPU",
        expected="with device = cuda, a class of torch.optim, or one that declares lockstep_update",
        found=name_of(optimizer),
        fix="choose another class, or declare lockstep_update in it, if it is so",
    )


def _may_cut(optimizer: torch.optim.Optimizer, kind: Kind, rule: Rule) -> bool:
    """Whether tensors of a kind may be cut: by their optimizer's rule, and seen to be so, since
    options may make a difference."""
    if rule == "together" or kind.group is None:
        return False
    return rule_of(part_of(optimizer, kind.group)) == "elementwise" and may_cut(optimizer, kind)


def _check_ownership(optimizer: torch.optim.Optimizer, ownership: str) -> None:
    """Refuse to divide among hosts what one worker has to update."""
    if ownership != "replicated":
        raise OptimizerError(
            f"{name_of(optimizer)} is not known to update tensors one by one, so hosts cannot "
            "divide the parameters",
            expected=f"with ownership = {ownership}, a class of torch.optim, or one that declares "
            'lockstep_update = "per_tensor" or "elementwise"',
            found=name_of(optimizer),
            fix="leave out ownership (every host updates everything then), or declare "
            "lockstep_update in the class, if it is so",
        )


def _optimizer_of(task: Task, trainable: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
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
    return optimizer


def _local_keys(task: Task, trainable: list[tuple[str, nn.Parameter]]) -> list[list[StateKey]]:
    """What a shard's own optimizer keeps per parameter; none where there are no local steps."""
    if not isinstance(task, LocalSGD):
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
        sparse = block.param in tables and tables[block.param].sparse
        kind = (group, shape, sparse, parameter.dtype, bool(optimizer.state.get(parameter)))
        if kind not in found:
            stand_in = nn.Parameter(torch.zeros(shape, dtype=parameter.dtype))
            start = initial_state(optimizer, parameter, block, shape)
            found[kind] = discover_state(optimizer, group, stand_in, start, sparse=sparse)
        keys.append(found[kind])
    return keys


@dataclass(frozen=True, kw_only=True)
class SlotCounts:
    """How many slots of each use there are, one after the other."""

    shards: int
    sums: int
    totals: int
    restored: int

    @property
    def all(self) -> int:
        return self.shards + self.sums + self.totals + self.restored

    @staticmethod
    def of(contents: StateContents, *, clip: bool, networked: bool) -> SlotCounts:
        """What a run needs."""
        compressed = contents.codec is not None
        sums = most_subtrees(contents.shards) if networked else 0
        return SlotCounts(
            shards=contents.shards,
            sums=contents.groups if compressed else sums,
            totals=int(clip or networked),
            restored=contents.groups if compressed else 0,
        )


def _allocate(
    contents: StateContents,
    allocation: Allocation,
    optimizer: torch.optim.Optimizer,
    param_groups: list[int | None],
    cuts: tuple[Mapping[str, Any], ...],
    *,
    max_workers: int,
    clip: bool,
    networked: bool,
    parted: bool,
) -> SharedState:
    """Create the segments, move the initial values in and bind the model to them."""
    layout, counts = allocation.layout, SlotCounts.of(contents, clip=clip, networked=networked)
    shape = ControlShape(
        shards=contents.shards, max_workers=max_workers, params=len(contents.trainable)
    )
    segments = _create_segments(layout, counts, shape, parted=parted)
    starts = _initial_states(contents, optimizer)  # before parameters move
    state_bytes = torch.frombuffer(segments["state"].map, dtype=torch.uint8)
    committed = _move_model(contents, layout, state_bytes)
    params = [parameter for _, parameter in contents.trainable]
    slot_bytes = layout.slots_bytes
    room = torch.frombuffer(segments["slots"].map, dtype=torch.uint8)[: counts.all * slot_bytes]
    slots = [
        make_slot(flat, params, allocation.grads, committed, contents.tables, allocation.kept)
        for flat in room.split(slot_bytes)
    ]
    totals_at = counts.shards + counts.sums
    shared = SharedState(
        model=contents.model,
        optimizer=optimizer,
        layout=layout,
        control=ControlSegment(segments["control"], shape),
        segments=segments,
        state_bytes=state_bytes,
        networked=networked,
        params=params,
        names=[name for name, _ in contents.trainable],
        groups=param_groups,
        tables=contents.tables,
        blocks=contents.blocks,
        keys=contents.keys,
        undivided=contents.undivided,
        local=allocation.local,
        local_keys=contents.local_keys,
        buffers=contents.buffers,
        committed=committed,
        buffer_rules=contents.buffer_rules,
        slots=slots[: counts.shards],
        sums=slots[counts.shards : totals_at],
        total=slots[totals_at] if counts.totals else None,
        restored=slots[totals_at + counts.totals :],
        grad_offsets=allocation.grads,
        codec=contents.codec,
        packed_offsets=allocation.packed,
        cuts=cuts,
    )
    with torch.no_grad():
        for number, start in enumerate(starts):
            _store_start(shared, number, start)
    shared.control.shard_done[:] = -1
    return shared


def _create_segments(
    layout: Layout, counts: SlotCounts, shape: ControlShape, *, parted: bool
) -> dict[str, Segment]:
    """The run's shared memory. `parted`: this host will keep a part of the state alone, and have
    memory for that when it is known which; the snapshot, if it is whole, is on a disk.

    Raises:
        ResourceError: there is not enough of it.
    """
    state_bytes, slots_bytes = layout.state_bytes, counts.all * layout.slots_bytes
    if parted:
        state = Segment.create("state", state_bytes, at_once=False)
        first = [entry for entry in layout.entries if entry.kind in ("param", "buffer")]
        check_available("the model", sum(entry.nbytes for entry in first))
        for entry in first:
            state.reserve(entry.offset, entry.nbytes)
        return {
            "state": state,
            "slots": Segment.create("slots", slots_bytes, at_once=False),
            "snapshot": Segment.on_disk("snapshot", state_bytes),
            "control": Segment.create("control", shape.nbytes()),
        }
    check_available("the run's shared memory", 2 * state_bytes + slots_bytes)
    return {
        "state": Segment.create("state", state_bytes),
        "slots": Segment.create("slots", slots_bytes),
        "snapshot": Segment.create("snapshot", state_bytes),
        "control": Segment.create("control", shape.nbytes()),
    }


def _move_model(
    contents: StateContents, layout: Layout, state_bytes: torch.Tensor
) -> list[torch.Tensor]:
    """Move parameters to the state segment, and copy buffers there; the committed buffers."""

    def moved(name: str, value: torch.Tensor) -> torch.Tensor:
        return view_entry(state_bytes, layout.entry(name)).copy_(value)

    with torch.no_grad():
        for name, parameter in contents.model.named_parameters():
            parameter.data = moved(name, parameter)
        return [moved(name, buffer) for name, buffer in contents.buffers]


def _initial_states(
    contents: StateContents, optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """Per block: the state that the optimizer's constructor made for it."""
    if contents.undivided is not None:
        return []  # its owner has what the constructor made (see `UndividedState`)
    starts = []
    for block, keys in zip(contents.blocks, contents.keys, strict=True):
        parameter = contents.trainable[block.param][1]
        shape = block_shape(block, parameter.shape, contents.tables)
        starts.append(initial_state(optimizer, parameter, block, shape) if keys else {})
    return starts


def _store_start(shared: SharedState, number: int, start: dict[str, Any]) -> None:
    """Store such a state in shared memory."""
    if not start:
        return
    for key in shared.keys[number]:
        store_value(shared.state_view(number, key), start[key.name])
    shared.view(PRESENT)[number] = 1
