"""Sliced parameters: which of them their optimizer allows to be cut, and the optimizer over slices.

The user's optimizer is made from the plain model's parameters, with their plain names. Then each
that is cut is replaced in its group by its slices, and so is what the constructor made of state.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lockstep.job.task import Task
from lockstep.optim.introspection import param_groups_of
from lockstep.optim.known_optimizers import name_of, part_of, rule_of
from lockstep.optim.probes import Kind, may_cut
from lockstep.planning.memory_layout import JoinedTensor
from lockstep.slices.cut_parameter import CutParameter
from lockstep.slices.cuts import choose_cuts
from lockstep.slices.slicing import slice_model
from lockstep.slices.words import words_of
from lockstep.state.embedding_tables import find_tables
from lockstep.system.object_graph import walk


@dataclass(frozen=True, kw_only=True)
class Sliced:
    """What has become of a model's matrices."""

    cuts: tuple[Mapping[str, Any], ...]
    """JSON-ready: a row for each module that has some."""
    joined: tuple[JoinedTensor, ...]
    """How the plain state dict is made of the slices."""


NOTHING_SLICED = Sliced(cuts=(), joined=())


def slice_parameters(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    slices: int,
    slice_plan: Mapping[str, str] | None,
) -> Sliced:
    """Cut a model's matrices into so many slices, and its optimizer's parameters with them.

    Raises:
        JobError: `slice_plan` names no module, or cuts a tied weight in two ways.
        OptimizerError: the optimizer has a tensor that is not the model's.
    """
    refused = {**_refused(model, optimizer), **_held(task, model)}
    cuts = choose_cuts(model, slices, words_of(model, slice_plan), refused)
    slicing = slice_model(model, cuts, slices)
    by_plain = {id(each.plain): each for each in slicing.parameters}
    for group in optimizer.param_groups:
        group["params"][:] = [
            part
            for parameter in group["params"]
            for part in (
                by_plain[id(parameter)].slices if id(parameter) in by_plain else [parameter]
            )
        ]
    for cut in slicing.parameters:
        if optimizer.state.get(cut.plain):
            _cut_state(optimizer.state.pop(cut.plain), cut, optimizer)
    return Sliced(cuts=tuple(cut.to_message() for cut in cuts), joined=slicing.joined)


def _cut_state(
    state: Mapping[str, Any], cut: CutParameter, optimizer: torch.optim.Optimizer
) -> None:
    """Give each slice its part of the state that the constructor made for the parameter."""
    for index, part in enumerate(cut.slices):
        own = {}
        for name, value in state.items():
            like = isinstance(value, torch.Tensor) and value.shape == cut.plain.shape
            own[name] = cut.cut(value)[index] if like else copy.deepcopy(value)
        optimizer.state[part] = own


def _refused(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """The parameters whose optimizer may not get them in parts, and why."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rule, groups = rule_of(optimizer), param_groups_of(optimizer, trainable)
    tables = find_tables(model, [parameter for _, parameter in trainable])
    tried: dict[Kind, bool] = {}
    refused = {}
    for index, ((name, parameter), group) in enumerate(zip(trainable, groups, strict=True)):
        if rule == "together":
            refused[name] = f"{name_of(optimizer)} is not known to update elements one by one"
        elif group is not None:
            part = part_of(optimizer, group)
            sparse = index in tables and tables[index].sparse
            kind = Kind(group=group, dtype=parameter.dtype, sparse=sparse)
            if rule_of(part) != "elementwise":
                refused[name] = f"{type(part).__name__} updates it as a whole"
            elif not tried.setdefault(kind, may_cut(optimizer, kind)):
                refused[name] = f"{type(part).__name__} with these options updates it as a whole"
    return refused


def _held(task: Task, model: nn.Module) -> dict[str, str]:
    """The parameters that something else than modules holds: it would not see the slices."""
    registered = Counter(
        id(parameter) for module in model.modules() for parameter in module._parameters.values()
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    seen: Counter[int] = Counter()
    for path, value in walk({"model": model, "task": task}):
        if id(value) in names and ".param_groups[" not in path:
            seen[id(value)] += 1
    return {
        names[number]: "something else than its module holds it, too"
        for number, count in seen.items()
        if count > registered[number]
    }
