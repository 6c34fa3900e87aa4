"""What an optimizer remembers beside its state: its groups' options, and its attributes.

What is made of tensors and numbers has a place in shared memory (see `state_form`), so that it
survives the worker. A change of anything else is refused: it would be lost.
"""

from __future__ import annotations

import pickle
import random
import types
from collections import deque
from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from lockstep.errors import OptimizerError
from lockstep.optim.chained import Together
from lockstep.state.state_form import Place
from lockstep.system.seeding import generator_states

APART = ("state", "param_groups")


def values_of(optimizer: torch.optim.Optimizer) -> dict[Place, Any]:
    """What it has beside its state: its groups' options, and its attributes."""
    found: dict[Place, Any] = {}
    for number, group in enumerate(optimizer.param_groups):
        for name, value in group.items():
            if name != "params":
                found[f"param_groups[{number}]", name] = value
    for where, part in _parts(optimizer, "self"):
        for name, value in vars(part).items():
            if name not in APART and not (type(part) is Together and name == "optimizers"):
                found[where, name] = value
    return found


def set_value(optimizer: torch.optim.Optimizer, place: Place, value: Any) -> None:
    """Set an option or an attribute."""
    where, name = place
    if where.startswith("param_groups"):
        optimizer.param_groups[int(where[13:-1])][name] = value
    else:
        setattr(dict(_parts(optimizer, "self"))[where], name, value)


def _parts(
    optimizer: torch.optim.Optimizer, where: str
) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    yield where, optimizer
    if type(optimizer) is Together:
        for number, part in enumerate(optimizer.optimizers):
            yield from _parts(part, f"{where}.optimizers[{number}]")


def look_at(optimizer: torch.optim.Optimizer, params: Container[int]) -> dict[Place, Any]:
    """Of each option and attribute something that changes when it does, as far as it can be told.

    `params` are the ids of the model's parameters: that these change is no secret.
    """
    seen = {id(optimizer.state), id(optimizer.param_groups), id(optimizer)}
    seen |= {id(group) for group in optimizer.param_groups}
    seen |= {id(part) for _, part in _parts(optimizer, "self")}
    return {place: _look(value, params, set(seen)) for place, value in values_of(optimizer).items()}


_BY_IDENTITY = (
    nn.Module, type, types.FunctionType, types.MethodType, types.BuiltinFunctionType,
    types.ModuleType,
)  # fmt: skip


def _look(value: Any, params: Container[int], seen: set[int]) -> Any:
    if value is None or isinstance(value, bool | int | float | str | bytes | complex):
        return type(value).__name__, repr(value)
    if isinstance(value, torch.Tensor):
        return "parameter" if id(value) in params else (id(value), value._version)
    if id(value) in seen:
        return id(value)
    seen.add(id(value))
    if isinstance(value, Mapping):
        return tuple((_look(k, params, seen), _look(v, params, seen)) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset | deque):
        return type(value).__name__, tuple(_look(part, params, seen) for part in value)
    if isinstance(value, torch.Generator):
        return bytes(value.get_state().numpy())
    if isinstance(value, random.Random | np.random.Generator | np.random.RandomState | np.ndarray):
        return pickle.dumps(value)
    if isinstance(value, _BY_IDENTITY) or not hasattr(value, "__dict__"):
        return id(value)
    return type(value).__name__, _look(vars(value), params, seen)


def check_not_drawn(name: str, before: tuple[object, ...]) -> None:
    """Refuse an optimizer of this name that has drawn random numbers since the global generators
    had these states.

    Raises:
        OptimizerError: it has.
    """
    if before != generator_states():
        raise OptimizerError(
            f"{name} draws random numbers in step()",
            expected="updates that depend on the gradients alone",
            found="the state of a global generator, changed by step()",
            fix="add the noise to the loss, which is seeded for each shard",
        )


def place_name(place: Place) -> str:
    """An option or an attribute, as Python has it."""
    where, name = place
    return f"{where}[{name!r}]" if where.startswith("param_groups") else f"{where}.{name}"


def key_name(key: object) -> str:
    """A key of an optimizer's state, in words."""
    return "a tensor" if isinstance(key, torch.Tensor) else repr(key)
