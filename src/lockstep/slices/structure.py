"""Structure: what can be proved of a module from what it is, without running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

ELEMENTWISE = frozenset({
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
    nn.Identity, nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.Sigmoid,
    nn.SiLU, nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
})  # fmt: skip
"""Exact types, without parameters and random numbers: a subclass may do anything else."""
FUNCTIONS: frozenset[Callable[..., Any]] = frozenset({
    F.relu, F.gelu, F.silu, F.elu, F.selu, F.celu, F.leaky_relu, F.relu6, F.mish, F.softplus,
    F.tanh, F.sigmoid, F.hardswish, torch.relu, torch.tanh, torch.sigmoid,
})  # fmt: skip
_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)  # fmt: skip


def is_plain(module: nn.Module) -> bool:
    """Whether calling a module is calling its class's forward, and nothing else."""
    return not any(getattr(module, name, None) for name in _HOOKS) and not (
        {"forward", "__call__", "_call_impl"} & vars(module).keys()
    )


def is_elementwise(function: Any) -> bool:
    """Whether a function or a module maps each element by itself; dropout does."""
    if isinstance(function, nn.Module):
        return type(function) in (*ELEMENTWISE, nn.Dropout) and is_plain(function)
    return callable(function) and function in FUNCTIONS


def chain_from(modules: Sequence[nn.Module], first: int) -> int | None:
    """Where the linear layer is that follows this one with only elementwise modules between, in
    what is run one after the other."""
    for index in range(first + 1, len(modules)):
        if isinstance(modules[index], nn.Linear):
            return index
        if not is_elementwise(modules[index]):
            return None
    return None


def sequential_chains(
    sequential: nn.Sequential, fits: Callable[[nn.Module, nn.Module], bool]
) -> list[tuple[nn.Module, nn.Module]]:
    """The pairs of linear layers that may be a chain. `fits`: whether two may be cut so."""
    modules, index, found = list(sequential), 0, []
    while index < len(modules):
        last = chain_from(modules, index) if isinstance(modules[index], nn.Linear) else None
        if last is not None and fits(modules[index], modules[last]):
            found.append((modules[index], modules[last]))
            index = last
        index += 1
    return found


def obstacle(module: nn.Module, kinds: tuple[type, ...], own: frozenset[str]) -> str:
    """Why a module cannot be replaced by one in slices; empty if it can.

    `kinds`: the exact types that can be; `own`: the names of what such a module has of its own.
    """
    name = type(module).__name__
    if type(module) not in kinds:
        base = next((kind for kind in kinds if isinstance(module, kind)), None)
        if base is None:
            return f"{name} is not known how to cut"
        return f"{name} is a subclass of {base.__name__}, and may do anything else"
    if not is_plain(module):
        return "it has hooks, or a forward of its own"
    for kind, held in (("parameter", module._parameters), ("buffer", module._buffers)):
        for each, value in held.items():
            if value is not None and (kind == "buffer" or each not in own):
                return f"it has a {kind} of its own, {each}"
    for each, child in module._modules.items():
        if each not in own:
            return f"it has a module of its own, {each}"
        if child is not None and not is_plain(child):
            return f"its {each} has hooks, or a forward of its own"
    return ""


def parameter_obstacle(parameter: nn.Parameter) -> str:
    """Why a parameter cannot be replaced by slices; empty if it can."""
    if type(parameter) is not nn.Parameter:
        return f"it is a {type(parameter).__name__}"
    if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
        return "it has hooks"
    if not parameter.dtype.is_floating_point:
        return f"it is of type {str(parameter.dtype).removeprefix('torch.')}"
    if not parameter.is_contiguous():
        return "it does not lie in memory row by row"
    if {name for name in vars(parameter) if not name.startswith("__")}:
        return "it has attributes of its own"
    return ""
