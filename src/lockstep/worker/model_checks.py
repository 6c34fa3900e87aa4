"""What a model may be made of: tensors that can be shared, summed and stored, each by itself."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lockstep.errors import TaskError
from lockstep.system.dtypes import STORED

Named = tuple[str, torch.Tensor]


def check_model(model: object) -> None:
    """Refuse a model that cannot be moved to shared memory as what it is.

    Raises:
        TaskError: it is no module, or one of its tensors cannot be shared or stored, or shares
            its memory with another.
    """
    if not isinstance(model, nn.Module):
        raise TaskError(
            "Task.model did not return a module",
            expected="a torch.nn.Module",
            found=repr(type(model)),
            fix="return the module itself",
        )
    params, buffers = list(model.named_parameters()), list(model.named_buffers())
    for kind, tensors in (("parameter", params), ("buffer", buffers)):
        for name, tensor in tensors:
            _check_tensor(kind, name, tensor)
    _check_memory(params, buffers)
    _check_state_dict(model, {id(tensor) for _, tensor in (*params, *buffers)})


def _check_tensor(kind: str, name: str, tensor: torch.Tensor) -> None:
    if is_lazy(tensor):
        raise TaskError(
            f"{kind} {name} has no shape yet",
            expected="a model whose tensors are all there",
            found=type(tensor).__name__,
            fix="give the layer its sizes, or pass one batch through it in Task.model",
        )
    what, found, fix = "", "", ""
    if tensor.device.type != "cpu":
        what, found, fix = "is not in main memory", f"device {tensor.device}", "build it on the CPU"
    elif tensor.layout is not torch.strided:
        what, found = "is sparse", str(tensor.layout)
        fix = "make it dense, or if it never changes keep it as a plain attribute of the module"
    elif tensor.dtype not in STORED:
        what, found = "has a type that cannot be stored", str(tensor.dtype)
        fix = "use another type; what never changes can be a plain attribute of the module"
    if what:
        expected = "dense tensors on the CPU, of the types that safetensors has"
        raise TaskError(f"{kind} {name} {what}", expected=expected, found=found, fix=fix)


def _check_memory(params: Sequence[Named], buffers: Sequence[Named]) -> None:
    """Parameters are moved one by one, which would separate views of one another.

    Buffers may share memory among themselves: the module keeps its own.
    """
    by_storage: dict[int, list[Named]] = {}
    for name, tensor in (*params, *buffers):
        if tensor.numel():
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    known = {id(tensor) for _, tensor in params}
    for tensors in by_storage.values():
        for (one, left), (other, right) in itertools.combinations(tensors, 2):
            if (id(left) in known or id(right) in known) and _overlap(left, right):
                raise TaskError(
                    f"{one} and {other} share memory, but are two tensors",
                    expected="one parameter under both names, or memory of their own",
                    found="an update of one would change the other",
                    fix=f"tie them by assigning the parameter itself, not its data: {other} = "
                    f"{one}; or clone it",
                )


def _overlap(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors of one storage have an element in common."""
    if left.dtype.itemsize != right.dtype.itemsize:
        return True
    size = left.dtype.itemsize
    marks = torch.zeros(left.untyped_storage().nbytes() // size + 1, dtype=torch.bool)
    marks.as_strided(left.shape, left.stride(), left.storage_offset()).fill_(True)
    return bool(marks.as_strided(right.shape, right.stride(), right.storage_offset()).any())


def _check_state_dict(model: nn.Module, known: set[int]) -> None:
    """The state dict has to be what is kept in step on all workers."""
    for key, value in model.state_dict(keep_vars=True).items():
        if id(value) not in known:
            raise TaskError(
                f"the module's state dict has {key}, which is neither a parameter nor a buffer",
                expected="parameters and buffers: they are what workers keep in step",
                found=repr(type(value)),
                fix="keep it in a buffer, or leave it out of the state dict",
            )


def held_tensors(task: object, model: nn.Module) -> list[Named]:
    """The tensors that the task itself holds, in its attributes or in modules there."""
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    found: list[Named] = []
    for name, value in vars(task).items():
        if isinstance(value, torch.Tensor):
            found.append((f"self.{name}", value))
        elif isinstance(value, nn.Module):
            tensors = itertools.chain(value.named_parameters(), value.named_buffers())
            found += [(f"self.{name}.{inner}", tensor) for inner, tensor in tensors]
    return [(name, tensor) for name, tensor in found if id(tensor) not in known]
