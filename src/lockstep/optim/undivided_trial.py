"""Undivided trial: what an optimizer that is not known keeps, found by stepping a copy twice.

It decides where things lie, and nothing else: what a later step changes beyond that is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from lockstep.errors import OptimizerError
from lockstep.optim.introspection import try_step
from lockstep.optim.known_optimizers import name_of
from lockstep.optim.remembered import check_not_drawn, key_name, place_name, values_of
from lockstep.state.state_form import FormError, UndividedState, form_of
from lockstep.system.seeding import generator_states

FIX = (
    "keep what step() remembers as tensors and numbers of a fixed form, in state[parameter], in "
    "the options of a group or in attributes of the optimizer"
)


def try_undivided(
    optimizer: torch.optim.Optimizer,
    trainable: Sequence[tuple[str, nn.Parameter]],
    sparse: Collection[str],
) -> UndividedState:
    """Step a copy of the optimizer, on copies of the parameters, and look at what it remembers.

    `sparse`: the parameters whose gradients are.

    Raises:
        OptimizerError: it cannot be run by Lockstep: it wants a closure, draws random numbers, or
            keeps something else than tensors and numbers for a parameter.
    """
    twin, memo = _copy(optimizer)
    own = {id(memo.get(id(parameter))): name for name, parameter in trainable}
    versions = [parameter._version for _, parameter in trainable]
    generator, drawn = torch.Generator().manual_seed(0), generator_states()
    for _ in range(2):
        for group in twin.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad:
                    gradient = torch.randn(
                        parameter.shape, generator=generator,
                        dtype=torch.float32 if not parameter.is_complex() else torch.complex64,
                    ).to(parameter.dtype)  # fmt: skip
                    gradient = torch.empty_like(parameter).copy_(gradient)
                    name = own.get(id(parameter))
                    parameter.grad = gradient.to_sparse(1) if name in sparse else gradient
        try_step(twin)
    check_not_drawn(name_of(optimizer), drawn)
    if versions != [parameter._version for _, parameter in trainable]:
        raise OptimizerError(
            f"{name_of(optimizer)} cannot be tried before the run",
            expected="a step() that updates the parameters of the optimizer's groups",
            found="a copy of the optimizer that updates the original's parameters",
            fix="override step() in a class, rather than in the optimizer itself",
        )
    memory = {
        p.untyped_storage().data_ptr() for group in twin.param_groups for p in group["params"]
    }
    _check_aliases(optimizer, trainable)
    forms = {}
    for index, (name, parameter) in enumerate(trainable):
        copied = memo.get(id(parameter))
        state = {} if copied is None else dict(twin.state.pop(copied, {}))
        try:
            forms[index] = form_of("", state, parameter.shape, memory)
        except FormError as error:
            raise OptimizerError(
                f"{name_of(optimizer)} keeps state that cannot be shared",
                expected="tensors and numbers, or lists of them",
                found=f"state of {name}: {error}",
                fix=FIX,
            ) from None
    others = [key for key, state in twin.state.items() if state]
    if others:
        raise OptimizerError(
            f"{name_of(optimizer)} keeps state that is not of one parameter",
            expected="state per parameter, in state[parameter], and what is of all in the options "
            "of a group or in attributes",
            found=f"changed by step(): state[{key_name(others[0])}]",
            fix=FIX,
        )
    remembered = {}
    for place, value in values_of(twin).items():
        try:
            remembered[place] = form_of(place_name(place), value, None, memory)
        except FormError:
            continue  # a change of it is refused
    initial = {
        index: copy.deepcopy(dict(optimizer.state[parameter]))
        for index, (_, parameter) in enumerate(trainable)
        if optimizer.state.get(parameter)
    }
    values = values_of(optimizer)
    return UndividedState(
        forms=forms,
        remembered=remembered,
        initial=initial,
        initial_values={p: copy.deepcopy(values[p]) for p in remembered if p in values},
    )


def _check_aliases(
    optimizer: torch.optim.Optimizer, trainable: Sequence[tuple[str, nn.Parameter]]
) -> None:
    """Refuse tensors that are a parameter's memory under another name: parameters are moved."""
    own = {id(parameter) for _, parameter in trainable}
    memory = {p.untyped_storage().data_ptr() for _, p in trainable if p.numel()}

    def aliased(value: Any) -> bool:
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            return id(value) not in own and value.untyped_storage().data_ptr() in memory
        if isinstance(value, dict):
            return any(aliased(part) for part in value.values())
        return isinstance(value, list | tuple) and any(aliased(part) for part in value)

    values = {place_name(place): value for place, value in values_of(optimizer).items()}
    values["state[parameter]"] = list(optimizer.state.values())
    found = [name for name, value in values.items() if aliased(value)]
    if found:
        raise OptimizerError(
            f"{name_of(optimizer)} holds a parameter's memory by another name",
            expected="parameters themselves, or copies of them",
            found=", ".join(found),
            fix="clone what is kept of a parameter, as in p.detach().clone()",
        )


def _copy(optimizer: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, dict[int, Any]]:
    """A copy with copies of all that it refers to, and these by the originals' ids.

    `copy.deepcopy` leaves an optimizer's attributes out.
    """
    memo: dict[int, Any] = {}
    found: list[torch.optim.Optimizer] = []
    waiting = [optimizer]
    while waiting:
        each = waiting.pop()
        if id(each) in memo:
            continue
        memo[id(each)] = object.__new__(type(each))
        found.append(each)
        for value in vars(each).values():
            values: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
            waiting += [part for part in values if isinstance(part, torch.optim.Optimizer)]
    try:
        for each in found:
            own = dict(vars(each))
            if getattr(own.get("step"), "_wrapped_by_lr_sched", False):
                del own["step"]  # it counts the original's steps
            vars(memo[id(each)]).update(copy.deepcopy(own, memo))
    except Exception as error:
        raise OptimizerError(
            f"{name_of(optimizer)} cannot be copied, to be tried before the run",
            expected="attributes that copy.deepcopy takes",
            found=f"{type(error).__name__}: {error}",
            fix="leave out of the optimizer what cannot be copied",
        ) from error
    return memo[id(optimizer)], memo
