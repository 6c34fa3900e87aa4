"""Forms: how what an optimizer remembers is made of tensors and numbers.

An optimizer whose work is not divided may keep more than one tensor by a name: lists of them, for
instance. Each tensor and number has a place in shared memory, and the value is built from them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lockstep.state.optimizer_state import NUMBER_TYPES, StateKey

CONSTANTS = (type(None), str, bytes, complex, torch.dtype, torch.device, torch.layout)
Place = tuple[str, str]
"""Where a value is (`self`, `param_groups[0]`, `self.optimizers[1]`), and its name there."""


class FormError(ValueError):
    """A value is not made as it was when the optimizer was tried."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a value is made of tensors and numbers."""

    kind: str
    """`leaf`, `list`, `tuple`, `dict`, or `constant`."""
    items: tuple[tuple[Any, Form], ...] = ()
    key: StateKey | None = None
    value: Any = None

    @property
    def keys(self) -> list[StateKey]:
        """Of all leaves, in order."""
        return [self.key] if self.key else [key for _, part in self.items for key in part.keys]


def form_of(
    name: str, value: Any, shape: torch.Size | None = None, params: Collection[int] = ()
) -> Form:
    """The form of a value of this name. `shape`: that of the parameter that it is kept for.
    `params`: where the memory of the model's parameters begins.

    Raises:
        FormError: it is made of something else than tensors and numbers.
    """
    kind = type(value)
    if kind in (list, tuple):
        parts = ((i, form_of(_path(name, i), part, shape, params)) for i, part in enumerate(value))
        return Form(kind=kind.__name__, items=tuple(parts))
    if kind is dict:
        pairs = (
            (key, form_of(_path(name, key), part, shape, params)) for key, part in value.items()
        )
        return Form(kind="dict", items=tuple(pairs))
    if kind.__name__ in NUMBER_TYPES and kind is NUMBER_TYPES[kind.__name__]:
        dtype = torch.float64 if kind is float else torch.int64
        key = StateKey(name=name, form=kind.__name__, dtype=dtype, shape=(), rebound=True)
        return Form(kind="leaf", key=key)
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        if value.numel() and value.untyped_storage().data_ptr() in params:
            raise FormError(f"{name} is a parameter of the model, or a part of one")
        key = StateKey(
            name=name, form="tensor", dtype=value.dtype,
            shape=tuple(value.shape), stride=_stride(value), rebound=True,
        )  # fmt: skip
        return Form(kind="leaf", key=key)
    if isinstance(value, CONSTANTS):
        return Form(kind="constant", value=value)
    raise FormError(f"{name} is a {kind.__name__}")


def _stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The stride of a dense tensor with its dimensions in the same order in memory: the bits of a
    product depend on it."""
    strides, step = [0] * tensor.ndim, 1
    for dim in sorted(range(tensor.ndim), key=lambda dim: (tensor.stride(dim), -dim)):
        strides[dim] = step
        step *= max(tensor.shape[dim], 1)
    return tuple(strides)


def _path(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def leaves(form: Form, value: Any, name: str = "") -> Iterator[tuple[StateKey, Any]]:
    """The tensors and numbers of a value, with their keys.

    Raises:
        FormError: it has another form.
    """
    if form.key is not None:
        _check_leaf(form.key, value)
        yield form.key, value
    elif form.kind == "constant":
        if type(value) is not type(form.value) or value != form.value:
            raise FormError(f"{name} is {_short(value)}, and was {_short(form.value)}")
    else:
        if type(value).__name__ != form.kind or len(value) != len(form.items):
            raise FormError(f"{name} is {_short(value)}, no longer a {form.kind} as it was")
        for key, part in form.items:
            if form.kind == "dict" and key not in value:
                raise FormError(f"{name} has no {key!r} any more")
            yield from leaves(part, value[key], f"{name}[{key!r}]")


def is_same(form: Form, value: Any, other: Any) -> bool:
    """Whether two values of a form have the same tensors and numbers."""
    try:
        pairs = zip(leaves(form, value), leaves(form, other), strict=True)
        return all(
            torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
            for (_, one), (_, two) in pairs
        )
    except FormError:
        return False


def rebuild(form: Form, load: Callable[[StateKey], Any]) -> Any:
    """A value of this form, of what `load` gives for each key."""
    if form.key is not None:
        return load(form.key)
    if form.kind == "constant":
        return form.value
    parts = {key: rebuild(part, load) for key, part in form.items}
    if form.kind == "dict":
        return parts
    return list(parts.values()) if form.kind == "list" else tuple(parts.values())


def _check_leaf(key: StateKey, value: Any) -> None:
    if isinstance(value, torch.Tensor) and key.form in ("like", "tensor"):
        if value.dtype == key.dtype and tuple(value.shape) == key.shape:
            return
        found = f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
        raise FormError(f"{key.name} is {found}, and was of shape {key.shape}, {key.dtype}")
    if type(value).__name__ != key.form:
        raise FormError(f"{key.name} is {_short(value)}, and was a {key.form}")


def _short(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)[:60]


@dataclass(frozen=True, kw_only=True)
class UndividedState:
    """What an optimizer keeps whose work is not divided among owners."""

    forms: Mapping[int, Form]
    """By trainable parameter: of its state."""
    remembered: Mapping[Place, Form]
    """Of options and attributes."""
    initial: Mapping[int, dict[str, Any]]
    """By trainable parameter: the state that the optimizer's constructor has made."""
    initial_values: Mapping[Place, Any]
    """Of options and attributes: what the constructor has made of them."""

    @property
    def remembered_keys(self) -> list[StateKey]:
        """Of all options and attributes, under names of their own."""
        return [key for form in self.remembered.values() for key in form.keys]
