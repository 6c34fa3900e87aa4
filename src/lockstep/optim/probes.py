"""Probes: whether a tensor may be cut, and whether tensors may be updated one by one.

Both are found by trying the user's optimizer on stand-ins and comparing bits.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lockstep.errors import OptimizerError
from lockstep.optim.introspection import borrowed
from lockstep.optim.row_update import step_rows

_PROBE_SHAPE, _PROBE_CUTS, _PROBE_STEPS = (67, 64), (7, 1280), 3
_PROBE_ROWS = (64 * 2, 64 * 20)
"""Where tensors with sparse gradients are cut: between rows, at even ones."""
_PROBE_TABLE, _PROBE_ROW, _PROBE_EVERY = (67, 61), 35, (2, 3, 67)
"""A table that is stepped by its rows, where it is cut, after an odd number of rows, and one of how
many rows each gradient has: the last has none below the cut."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What an optimizer may treat differently."""

    group: int | None
    """The parameter group; None: the optimizer leaves the tensor alone."""
    dtype: torch.dtype
    sparse: bool
    """Whether gradients are sparse: of some rows."""


def may_cut(optimizer: torch.optim.Optimizer, kind: Kind) -> bool:
    """Whether this optimizer gives the same bits on a tensor and on its parts.

    Tried, not assumed: LAMB, Adafactor and Muon fail here. One cut is at an odd place, so that a
    kernel whose vectorised middle and scalar tail differ would fail as well. With sparse gradients
    it is cut between rows.
    """
    generator = torch.Generator().manual_seed(0)
    size = _PROBE_SHAPE[0] * _PROBE_SHAPE[1]
    tensors = [
        torch.randn(size, generator=generator).to(kind.dtype) for _ in range(1 + _PROBE_STEPS)
    ]
    rows = (-1, _PROBE_SHAPE[1])
    cuts, shape = (_PROBE_ROWS, rows) if kind.sparse else (_PROBE_CUTS, None)
    try:
        whole = _trial(optimizer, kind, tensors, (0, size), rows)
        parts = _trial(optimizer, kind, tensors, (0, *cuts, size), shape)
    except Exception:
        return False  # it wants a matrix (Muon), a closure (LBFGS) or has state of its own shape
    return _same_bits(whole, parts)


def may_step_rows(optimizer: torch.optim.Optimizer, kind: Kind) -> bool:
    """Whether a step by a sparse gradient is one on the rows that it has, once there is state.

    It is not where the other rows' state decays, for instance. The same rows in two runs, at an odd
    place of an odd width, must get the same: how many rows are stepped together is the owner's.
    """
    if kind.group is None or not kind.sparse:
        return False
    generator = torch.Generator().manual_seed(0)
    first, *tensors = [
        torch.randn(_PROBE_TABLE, generator=generator).to(kind.dtype)
        for _ in range(1 + len(_PROBE_EVERY))
    ]
    whole = slice(0, len(first))
    upper, lower = slice(0, _PROBE_ROW), slice(_PROBE_ROW, len(first))
    try:
        expected, stepped, above, below = (
            _step_table(optimizer, kind.group, (first, *tensors), part, by_rows=by_rows)
            for part, by_rows in ((whole, False), (whole, True), (upper, True), (lower, True))
        )
    except Exception:
        return False
    return all(
        _same_values(value, stepped[name])
        and _same_values(value[upper] if _is_like(value, first) else value, above[name])
        and _same_values(value[lower] if _is_like(value, first) else value, below[name])
        for name, value in expected.items()
    )


def _step_table(
    optimizer: torch.optim.Optimizer,
    group: int,
    tensors: Sequence[torch.Tensor],
    part: slice,
    *,
    by_rows: bool,
) -> dict[str, Any]:
    """What becomes of a part of the first tensor, a table, by sparse gradients of some rows of the
    others, each time other ones: its state, and itself under the name of "".

    `by_rows`: from the second step on.
    """
    table = nn.Parameter(tensors[0][part].clone())

    def step(parameter: nn.Parameter, state: dict[str, Any]) -> None:
        optimizer.param_groups[group]["params"] = [parameter]
        optimizer.state[parameter] = state
        optimizer.step()

    sample = _sample(optimizer)
    with borrowed(optimizer, {group: [table]}):
        state = _same_start(sample, table)
        for begun, (tensor, every) in enumerate(zip(tensors[1:], _PROBE_EVERY, strict=True)):
            gradient = _some_rows(tensor[part], every, part.start)
            if by_rows and begun:
                like = {name for name, value in state.items() if _is_like(value, table)}
                step_rows(table.detach(), gradient, state, like, step)
            else:
                table.grad = gradient
                step(table, state)
    return {**state, "": table.detach()}


def _is_like(value: Any, parameter: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == parameter.shape


def _same_values(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return _same_bits(left.detach().reshape(-1), right.detach().reshape(-1))
    return bool(left == right)


def check_independent(optimizer: torch.optim.Optimizer, kind: Kind) -> None:
    """Try whether tensors are updated together as each is by itself.

    Raises:
        OptimizerError: they are not, so who owns which of them would change the numbers.
    """
    generator = torch.Generator().manual_seed(0)
    (rows, columns), cut = _PROBE_SHAPE, _PROBE_CUTS[1]
    size, shape = rows * columns, (-1, columns)
    tensors = [
        torch.randn(size, generator=generator).to(kind.dtype) for _ in range(1 + _PROBE_STEPS)
    ]
    try:
        both = _trial(optimizer, kind, tensors, (0, cut, size), shape)
        alone = [
            _trial(optimizer, kind, [tensor[start:stop] for tensor in tensors], span, shape)
            for start, stop, span in ((0, cut, (0, cut)), (cut, size, (0, size - cut)))
        ]
    except Exception:
        return  # `discover_state` says what is wrong with it
    if not _same_bits(both, torch.cat(alone)):
        raise OptimizerError(
            f"{type(optimizer).__name__} updates a tensor in another way when there are others",
            expected="an optimizer that updates each tensor by itself",
            found="other bits for two tensors together than for one after the other",
            fix="leave out what it takes over all tensors, such as a limit of the global norm: "
            "that is the job's clip_grad_norm",
        )


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def _trial(
    optimizer: torch.optim.Optimizer,
    kind: Kind,
    tensors: Sequence[torch.Tensor],
    edges: Sequence[int],
    shape: tuple[int, ...] | None,
) -> torch.Tensor:
    """The first tensor after a step with each of the others, cut at `edges`, joined again."""
    spans = list(itertools.pairwise(edges))

    def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
        cut = [tensor[start:stop].clone() for start, stop in spans]
        return [part.view(shape) for part in cut] if shape else cut

    sample = _sample(optimizer)
    parameters = [nn.Parameter(part) for part in parts(tensors[0])]
    assert kind.group is not None
    with borrowed(optimizer, {kind.group: parameters}):
        if sample:
            for parameter in parameters:
                optimizer.state[parameter] = _same_start(sample, parameter)
        for gradient in tensors[1:]:
            for parameter, part in zip(parameters, parts(gradient), strict=True):
                parameter.grad = _some_rows(part) if kind.sparse else part
            optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def _some_rows(gradient: torch.Tensor, every: int = 2, start: int = 0) -> torch.Tensor:
    """One of so many rows of a gradient, as a sparse tensor. `start`: the first row's number."""
    rows = torch.arange(-start % every, len(gradient), every)
    return torch.sparse_coo_tensor(
        rows[None], gradient[rows], gradient.shape, check_invariants=False, is_coalesced=True
    )


def _sample(optimizer: torch.optim.Optimizer) -> Mapping[str, Any]:
    """The state that the constructor has made for some parameter; nothing if it makes none."""
    return next((state for state in optimizer.state.values() if state), {})


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
