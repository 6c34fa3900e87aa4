"""Probes: whether a tensor may be cut, and whether tensors may be updated one by one.

Both are found by trying the user's optimizer on stand-ins and comparing bits.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lockstep.errors import OptimizerError
from lockstep.optim import borrowed

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
    except Exception:
        return False  # it wants a matrix (Muon), a closure (LBFGS) or has state of its own shape
    return _same_bits(whole, parts)


def check_independent(optimizer: torch.optim.Optimizer, group: int, dtype: torch.dtype) -> None:
    """Try whether tensors are updated together as each is by itself.

    Raises:
        OptimizerError: they are not, so who owns which of them would change the numbers.
    """
    generator = torch.Generator().manual_seed(0)
    (rows, columns), cut = _PROBE_SHAPE, _PROBE_CUTS[1]
    size, shape = rows * columns, (-1, columns)
    tensors = [torch.randn(size, generator=generator).to(dtype) for _ in range(1 + _PROBE_STEPS)]
    try:
        both = _trial(optimizer, group, tensors, (0, cut, size), shape)
        alone = [
            _trial(optimizer, group, [tensor[start:stop] for tensor in tensors], span, shape)
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
