"""The user's optimizer, taken apart into blocks: what state it keeps, and whether it may be cut.

`torch.optim` classes update each tensor by itself, so a worker can run the user's own optimizer on
just the blocks that it owns. Two things have to be known for that, and both are found by trying:
which state the class keeps per tensor, and whether a tensor may be cut without changing a bit.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lockstep.errors import OptimizerError
from lockstep.layout import Block

NUMBER_TYPES: dict[str, type] = {"int": int, "float": float, "bool": bool}


@dataclass(frozen=True, kw_only=True)
class StateKey:
    """One value that an optimizer keeps per tensor."""

    name: str
    form: str
    """`like` (a tensor of as many elements as the block), `tensor`, or a Python number's type."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    rebound: bool
    """Whether the optimizer replaces the object at each step, rather than changing it in place."""


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


def bare_step(optimizer: torch.optim.Optimizer) -> Callable[[torch.optim.Optimizer], Any]:
    """The optimizer's own `step`, without the wrapper that PyTorch puts around it for profiling
    and for hooks, where there are no hooks: it costs a quarter of a small model's update."""
    step = type(optimizer).step
    inner = getattr(step, "__wrapped__", None)
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    if inner is None or not getattr(step, "hooked", False) or any(hooks):
        return lambda opt: opt.step()
    return cast("Callable[[torch.optim.Optimizer], Any]", inner)


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
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, block: Block
) -> dict[str, Any]:
    """The state that the optimizer made for `parameter` at its construction, cut to the block."""
    state: dict[str, Any] = {}
    for name, value in optimizer.state.get(parameter, {}).items():
        if (
            isinstance(value, torch.Tensor)
            and value.numel() == parameter.numel()
            and not block.whole
        ):
            value = value.detach().reshape(-1)[block.start : block.stop]
        state[name] = copy.deepcopy(value)
    return state


def discover_state(
    optimizer: torch.optim.Optimizer,
    group: int,
    parameter: nn.Parameter,
    block: Block,
) -> list[StateKey]:
    """Step a stand-in of the block's shape twice and look at the state that appears.

    Raises:
        OptimizerError: the optimizer cannot be run like this.
    """
    shape = parameter.shape if block.whole else (block.size,)
    stand_in = nn.Parameter(torch.zeros(shape, dtype=parameter.dtype))
    kind = type(optimizer).__name__
    start = initial_state(optimizer, parameter, block)
    with borrowed(optimizer, {group: [stand_in]}):
        if start:
            optimizer.state[stand_in] = start
        options = _options(optimizer)
        first: dict[str, Any] = {}
        for _ in range(2):
            stand_in.grad = torch.zeros_like(stand_in)
            first = dict(optimizer.state.get(stand_in, {}))
            try:
                optimizer.step()
            except TypeError as error:
                raise OptimizerError(
                    f"{kind} cannot be run by owners of blocks",
                    expected="an optimizer whose step() needs no closure",
                    found=str(error),
                    fix="use another optimizer, for instance torch.optim.AdamW",
                ) from error
        changed = [name for name, value in _options(optimizer).items() if options[name] != value]
        if changed:
            raise OptimizerError(
                f"{kind} keeps state that couples all parameters",
                expected="state per parameter only",
                found=f"param_groups options changed by step(): {', '.join(changed)}",
                fix="use an optimizer with per-parameter state",
            )
        return [
            _describe(name, value, first.get(name), stand_in, kind)
            for name, value in optimizer.state.get(stand_in, {}).items()
            if value is not None
        ]


def _options(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        f"{number}.{name}": copy.deepcopy(value)
        for number, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
        if name != "params" and not isinstance(value, torch.Tensor)
    }


def _describe(name: str, value: Any, before: Any, stand_in: nn.Parameter, kind: str) -> StateKey:
    if isinstance(value, torch.Tensor):
        like = value.shape == stand_in.shape and stand_in.ndim > 0
        return StateKey(
            name=name,
            form="like" if like else "tensor",
            dtype=value.dtype,
            shape=tuple(value.shape),
            rebound=value is not before,
        )
    form = type(value).__name__
    if form not in NUMBER_TYPES:
        raise OptimizerError(
            f"{kind} keeps state that cannot be shared",
            expected="tensors and numbers",
            found=f"state[{name!r}] is a {form}",
            fix="use an optimizer whose state is made of tensors and numbers",
        )
    dtype = torch.float64 if form == "float" else torch.int64
    return StateKey(name=name, form=form, dtype=dtype, shape=(), rebound=True)


_PROBE_SHAPE, _PROBE_CUTS, _PROBE_STEPS = (67, 64), (7, 1280), 3


def may_cut(optimizer: torch.optim.Optimizer, group: int, dtype: torch.dtype) -> bool:
    """Whether this optimizer gives the same bits on a tensor and on its parts.

    Tried, not assumed: LAMB, Adafactor and Muon fail here. One cut is at an odd place, so that a
    kernel whose vectorised middle and scalar tail differ would fail as well.
    """
    generator = torch.Generator().manual_seed(0)
    size = _PROBE_SHAPE[0] * _PROBE_SHAPE[1]
    tensors = [torch.randn(size, generator=generator).to(dtype) for _ in range(1 + _PROBE_STEPS)]
    try:
        whole = _trial(optimizer, group, tensors, (0, size), _PROBE_SHAPE)
        parts = _trial(optimizer, group, tensors, (0, *_PROBE_CUTS, size), None)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False  # it wants a matrix (Muon), a closure (LBFGS) or has state of its own shape
    return torch.equal(whole, parts)


def _trial(
    optimizer: torch.optim.Optimizer,
    group: int,
    tensors: Sequence[torch.Tensor],
    edges: Sequence[int],
    shape: tuple[int, ...] | None,
) -> torch.Tensor:
    """The first tensor after a step with each of the others, cut at `edges`, joined again."""
    spans = list(itertools.pairwise(edges))

    def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
        cut = [tensor[start:stop].clone() for start, stop in spans]
        return [part.view(shape) for part in cut] if shape else cut

    sample: Mapping[str, Any] = next((state for state in optimizer.state.values() if state), {})
    parameters = [nn.Parameter(part) for part in parts(tensors[0])]
    with borrowed(optimizer, {group: parameters}):
        if sample:
            for parameter in parameters:
                optimizer.state[parameter] = _same_start(sample, parameter)
        for gradient in tensors[1:]:
            for parameter, part in zip(parameters, parts(gradient), strict=True):
                parameter.grad = part
            optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def _same_start(sample: Mapping[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
    """A state like the one that the constructor made for another parameter (as Adagrad does)."""
    state: dict[str, Any] = {}
    for name, value in sample.items():
        if isinstance(value, torch.Tensor) and value.ndim:
            if not bool((value == value.flatten()[0]).all()):
                raise ValueError(f"state {name!r} does not start as a constant")
            state[name] = torch.full_like(parameter, value.flatten()[0].item())
        else:
            state[name] = copy.deepcopy(value)
    return state
