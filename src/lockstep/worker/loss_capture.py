"""Loss capture: a task's loss as a graph of tensor operations, and when the graph may stand for it.

The Python of the loss and of the model is read by Dynamo, PyTorch's own front end for compilers. It
gives the operations and a *guard*: a check of everything outside the tensors that they depend on
(modes, attributes, globals, shapes, types). The guard is asked before each use, so a branch that
is taken later, or a module that is replaced, is met by the plain loss and not by the graph.
Whatever a graph cannot say (a side effect, a random number of Python's, a number taken from a
tensor) makes the loss one that cannot be captured.
"""

from __future__ import annotations

import dis
import itertools
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lockstep.job.task import Task
from lockstep.optim.local_sgd import LocalSGD
from lockstep.planning.plan import Plan
from lockstep.slices.slicing import draws_by_slice
from lockstep.state.shared_state import SharedState

_NAMES = itertools.count()
_LOADED = ("_parameters", "_modules", "_buffers")
_CALLED = ("record_pregraph_bytecode_enter", "record_pregraph_bytecode_exit")
"""Dynamo's own marks around the loading of arguments."""
_GLOBALS = ("__compiled_fn", "__import_torch_dot__dynamo_dot_utils")
_EFFECTS = (
    "STORE_ATTR", "STORE_SUBSCR", "STORE_SLICE", "STORE_GLOBAL", "STORE_NAME", "STORE_DEREF",
    "DELETE_ATTR", "DELETE_SUBSCR", "DELETE_GLOBAL", "DELETE_NAME", "DELETE_DEREF",
)  # fmt: skip


class UntraceableError(Exception):
    """A loss that is computed the plain way, and why."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CapturedLoss:
    """The operations of a loss, for batches of one form."""

    graph: torch.fx.GraphModule
    """Gives a tuple with the loss."""
    loss: torch.Tensor
    """Of the batch that it was captured with, without its graph."""
    inputs: Sequence[torch.Tensor]
    """What the graph was given: parameters, buffers, and the tensors of the batch."""
    guard: Callable[[dict[str, Any]], bool]
    kept: tuple[object, ...]
    """What the guard must not outlive."""

    def holds(self, task: Task, model: nn.Module, batch: Any) -> bool:
        """Whether the loss of this batch is what the graph computes."""
        return self.guard({"task": task, "model": model, "batch": batch})


def _call(task: Task, model: nn.Module, batch: Any) -> Any:
    return task.loss(model, batch)


def capture(task: Task, model: nn.Module, batch: Any) -> CapturedLoss:
    """Capture the loss of batches such as this one.

    It is computed for this batch: random numbers are drawn, buffers and the batch may change.

    Raises:
        UntraceableError: it cannot be captured.
    """
    import torch._dynamo as dynamo
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    graphs: list[torch.fx.GraphModule] = []
    given: list[tuple[Any, ...]] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)

        def run(*inputs: Any) -> Any:
            given.append(inputs)
            return graph(*inputs)

        return run

    # Guards are kept by code object: each capture has one of its own.
    code = _call.__code__.replace(co_name=f"loss_{next(_NAMES)}")
    function = types.FunctionType(code, _call.__globals__)
    try:
        with (
            dynamo.config.patch(
                skip_nnmodule_hook_guards=False,
                automatic_dynamic_shapes=False,
                specialize_float=True,
            ),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # of what it cannot read: the reason is told
            compiled = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
            loss = compiled(task, model, batch)
        entries = _debug_get_cache_entry_list(code)
    except Exception as error:  # the compiler has many, and the plain loss tells of the task's own
        raise UntraceableError(f"the loss has no graph: {first_line(error)}") from error
    if len(graphs) != 1 or len(given) != 1 or len(entries) != 1:
        raise UntraceableError("the loss is not one graph")
    _check_code(entries[0].code)
    _check_graph(graphs[0])
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise UntraceableError("the loss is more than one number")
    if not all(isinstance(value, torch.Tensor) for value in given[0]):
        raise UntraceableError("the graph needs more than tensors")
    return CapturedLoss(
        graph=graphs[0],
        loss=loss.detach(),
        inputs=given[0],
        guard=entries[0].guard_manager.check,
        kept=(function, compiled, entries[0]),
    )


def first_line(error: Exception) -> str:
    """What an error says first; at most 200 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _check_code(code: types.CodeType) -> None:
    """Refuse what does more than to collect the graph's arguments, to call it and to return.

    Raises:
        UntraceableError: it does.
    """
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, str(instruction.argval)
        if operation in _EFFECTS:
            raise UntraceableError("the loss changes something that outlives it")
        if operation in ("LOAD_ATTR", "LOAD_METHOD") and name not in (*_LOADED, *_CALLED):
            raise UntraceableError(f"the loss uses .{name}, which is no parameter and no buffer")
        if operation == "LOAD_GLOBAL" and not name.startswith(_GLOBALS):
            raise UntraceableError(f"the loss uses {name}")


def _check_graph(graph: torch.fx.GraphModule) -> None:
    """Refuse tensors that the graph has of its own.

    Raises:
        UntraceableError: there are some.
    """
    if any(node.op == "get_attr" for node in graph.graph.nodes):
        raise UntraceableError("the loss makes a constant tensor")
    returned = next(node.args[0] for node in graph.graph.nodes if node.op == "output")
    if len(returned) != 1:
        raise UntraceableError("the graph gives more than the loss")


def obstacle(task: Task, shared: SharedState, plan: Plan) -> str:
    """Why a captured loss cannot stand for the plain pass; empty if it may."""
    if plan.precision == "bf16":
        return "under autocast, casts are kept from one operation to another"
    if plan.device == "cuda":
        return "tracing has not been tried on a GPU"
    if isinstance(task, LocalSGD):
        return "a step has several updates"
    if shared.tables:
        return "large embeddings have gradients of their own form"
    if type(task).set_position is not Task.set_position:
        return "the task looks at its position"
    if shared.cuts and draws_by_slice(shared.model):
        return "slices draw random numbers of their own"
    return ""


def has_hooks(model: nn.Module) -> bool:
    """Whether code of others runs in a backward pass, or around every module."""
    return bool(
        any(parameter._backward_hooks for parameter in model.parameters())
        or any(type(parameter) is not nn.Parameter for parameter in model.parameters())
        or nn.modules.module._has_any_global_hook()
    )


def tensors_of(batch: Any) -> Sequence[torch.Tensor]:
    """The tensors of a batch, in a fixed order."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    return list(batch.values()) if isinstance(batch, dict) else list(batch)


def checked_tensors(batch: Any) -> Sequence[torch.Tensor] | None:
    """The same; None if the batch holds more than tensors."""
    if not isinstance(batch, torch.Tensor | dict | list | tuple):
        return None
    tensors = tensors_of(batch)
    return tensors if all(isinstance(each, torch.Tensor) for each in tensors) else None
