"""Optimizer introspection: the user's optimizer taken apart into blocks, and its state of each.

`torch.optim` classes update each tensor by itself, so a worker can run the user's own optimizer on
just the blocks that it owns. Which state a class keeps per tensor is found by trying, as is whether
a tensor may be cut (see `probes`).
"""

from __future__ import annotations

import contextlib
import copy
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lockstep.errors import OptimizerError
from lockstep.optim.chained import Together
from lockstep.optim.remembered import check_not_drawn
from lockstep.planning.blocks import Block
from lockstep.state.optimizer_state import NUMBER_TYPES, StateKey
from lockstep.system.seeding import generator_states


def param_groups_of(
    optimizer: torch.optim.Optimizer, trainable: Sequence[tuple[str, nn.Parameter]]
) -> list[int | None]:
    """For each trainable parameter, the index of its group; None if the optimizer leaves it out.

    Raises:
        OptimizerError: the optimizer holds a tensor that is not a parameter of the model.
    """
    known = {id(parameter): index for index, (_, parameter) in enumerate(trainable)}
    groups: list[int | None] = [None] * len(trainable)
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) in known:
                groups[known[id(parameter)]] = number
            elif parameter.requires_grad:
                raise OptimizerError(
                    "the optimizer holds a tensor that is not a parameter of the model",
                    expected="only tensors from the `params` argument of `Task.optimizer`",
                    found=f"a tensor of shape {tuple(parameter.shape)} in group {number}",
                    fix="build the optimizer from `params` alone",
                )
    return groups


@contextlib.contextmanager
def borrowed(
    optimizer: torch.optim.Optimizer, members: Mapping[int, list[nn.Parameter]]
) -> Iterator[torch.optim.Optimizer]:
    """The optimizer with other tensors in its groups and an empty state, for a while."""
    groups = [dict(group) for group in optimizer.param_groups]
    state = optimizer.state
    optimizer.state = defaultdict(dict)
    for number, group in enumerate(optimizer.param_groups):
        group["params"] = members.get(number, [])
    try:
        yield optimizer
    finally:
        for group, saved in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(saved)
        optimizer.state = state


def initial_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, block: Block, shape: tuple[int, ...]
) -> dict[str, Any]:
    """The state that the optimizer made for `parameter` at its construction, cut to the block,
    in the block's shape."""
    state: dict[str, Any] = {}
    for name, value in optimizer.state.get(parameter, {}).items():
        if (
            isinstance(value, torch.Tensor)
            and value.numel() == parameter.numel()
            and not block.whole
        ):
            value = value.detach().reshape(-1)[block.start : block.stop].view(shape)
        state[name] = copy.deepcopy(value)
    return state


def discover_state(
    optimizer: torch.optim.Optimizer,
    group: int,
    stand_in: nn.Parameter,
    start: dict[str, Any],
    *,
    sparse: bool,
) -> list[StateKey]:
    """Step a stand-in of a block twice and look at the state that appears.

    `start` is the state that it has from the beginning; `sparse`: its gradients are.

    Raises:
        OptimizerError: the optimizer cannot be run like this: it wants a closure, remembers
            something that is not of one tensor, or draws random numbers.
    """
    kind = type(optimizer).__name__
    with borrowed(optimizer, {group: [stand_in]}):
        if start:
            optimizer.state[stand_in] = start
        remembered, drawn = _remembered(optimizer), generator_states()
        first: dict[str, Any] = {}
        for _ in range(2):
            zeros = torch.zeros_like(stand_in)
            stand_in.grad = zeros.to_sparse(1) if sparse else zeros
            first = dict(optimizer.state.get(stand_in, {}))
            try_step(optimizer)
        check_not_drawn(kind, drawn)
        now = _remembered(optimizer)
        changed = [key for key in now if key not in remembered or remembered[key] != now[key]]
        changed += [f"state[{key!r}]" for key in optimizer.state if key is not stand_in]
        if changed:
            raise OptimizerError(
                f"{kind} keeps state that couples all parameters",
                expected="state per parameter only, in optimizer.state[parameter]",
                found=f"changed by step(): {', '.join(changed)}",
                fix="use an optimizer with per-parameter state",
            )
        return [
            _describe(name, value, first.get(name), stand_in, optimizer)
            for name, value in optimizer.state.get(stand_in, {}).items()
            if value is not None
        ]


def check_known(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any], keys: Collection[StateKey]
) -> None:
    """Refuse state that appears later than in the first two steps: it has no place.

    Raises:
        OptimizerError: there is some.
    """
    if len(state) == len(keys):
        return
    known = {key.name for key in keys}
    late = [name for name, value in state.items() if value is not None and name not in known]
    if late:
        raise OptimizerError(
            f"{type(optimizer).__name__} begins to keep state after its second step",
            expected="all of a parameter's state at its first step",
            found=", ".join(f"state[{name!r}]" for name in late),
            fix="make it at the first step, as zeros",
        )


def try_step(optimizer: torch.optim.Optimizer) -> None:
    """Step; what a class of torch.optim, or the lack of a closure, raises is explained."""
    try:
        optimizer.step()
    except Exception as error:
        closure = isinstance(error, TypeError) and "closure" in str(error)
        if not closure and not _is_torchs(optimizer):
            raise  # the user's own code: the traceback says more
        raise OptimizerError(
            f"{type(optimizer).__name__} cannot be run by owners of blocks",
            expected="an optimizer whose step() needs no closure"
            if closure
            else "an optimizer for the CPU, whose step() takes the model's gradients, dense or "
            "sparse, and updates in place",
            found=str(error),
            fix="use another optimizer, for instance torch.optim.AdamW",
        ) from error


def _is_torchs(optimizer: torch.optim.Optimizer) -> bool:
    parts = optimizer.optimizers if type(optimizer) is Together else (optimizer,)
    return all(type(part).__module__.startswith("torch.optim.") for part in parts)


def _remembered(optimizer: torch.optim.Optimizer) -> dict[str, object]:
    """What the optimizer may remember beside its state: its groups' options and its attributes."""
    options = {
        f"param_groups[{number}][{name!r}]": copy.deepcopy(value)
        for number, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name != "params" and not isinstance(value, torch.Tensor)
    }
    attributes = {
        f"self.{name}": (id(value), value._version) if isinstance(value, torch.Tensor) else value
        for name, value in vars(optimizer).items()
        if isinstance(value, int | float | torch.Tensor) and not isinstance(value, bool)
    }
    return {**options, **attributes}


def _describe(
    name: str, value: Any, before: Any, stand_in: nn.Parameter, optimizer: torch.optim.Optimizer
) -> StateKey:
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        like = value.shape == stand_in.shape and stand_in.ndim > 0
        return StateKey(
            name=name,
            form="like" if like else "tensor",
            dtype=value.dtype,
            shape=tuple(value.shape),
            # Others' code may replace it at some steps only, as Lookahead does.
            rebound=value is not before or not _is_torchs(optimizer),
        )
    form = type(value).__name__
    if isinstance(value, torch.Tensor):
        form = f"tensor of layout {value.layout}"
    if form not in NUMBER_TYPES:
        raise OptimizerError(
            f"{type(optimizer).__name__} keeps state that cannot be shared",
            expected="tensors and numbers",
            found=f"state[{name!r}] is a {form}",
            fix="use an optimizer whose state is made of tensors and numbers",
        )
    dtype = torch.float64 if form == "float" else torch.int64
    return StateKey(name=name, form=form, dtype=dtype, shape=(), rebound=True)
