"""Undivided update: an optimizer that is not known steps as its author wrote it.

One owner has all parameters: the model's own, in the optimizer's own groups and order. What the
optimizer remembers lies in shared memory, so that another process can take over; what cannot lie
there is looked at around each step, and its change is refused.
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
from lockstep.optim.remembered import look_at, random_states, set_value, values_of
from lockstep.state.optimizer_state import load_value, store_value
from lockstep.state.shared_state import CHANGED, PRESENT, SharedState, remembered_name
from lockstep.state.state_form import (
    FormError,
    Place,
    UndividedState,
    form_of,
    leaves,
    rebuild,
)

FIX = (
    "keep what step() remembers as tensors and numbers of a fixed form, in state[parameter], in "
    "the options of a group or in attributes of the optimizer"
)


class UndividedUpdate:
    """Steps the whole optimizer. Made anew when the membership changes."""

    def __init__(self, shared: SharedState, numbers: Sequence[int]) -> None:
        """`numbers`: the blocks, each a whole parameter, that the optimizer has."""
        assert shared.undivided is not None
        self.shared, self.optimizer, self._kept = shared, shared.optimizer, shared.undivided
        self._homes = {
            number: {key: shared.state_view(number, key) for key in shared.keys[number]}
            for number in numbers
        }
        self._remembered = {
            key.name: shared.view(remembered_name(key)) for key in self._kept.remembered_keys
        }
        self._changed = shared.view(CHANGED)
        self._places = list(self._kept.remembered)
        self._present = shared.view(PRESENT)
        self._params = {id(parameter) for parameter in shared.model.parameters()}
        self._mine = {shared.params[shared.blocks[number].param] for number in numbers}
        for number in numbers:
            self._load_state(number)

    def step(self, scheduled: Collection[tuple[int, str]]) -> None:
        """Step once. The parameters hold their gradients. `scheduled`: the options, by group, that
        the schedule sets.

        Raises:
            OptimizerError: the step has changed what cannot be kept.
        """
        optimizer = self.optimizer
        for index, place in enumerate(self._places):
            if self._changed[index]:
                set_value(optimizer, place, self._value(place))
        held = values_of(optimizer)  # so that no new object has an old one's identity
        before, drawn = look_at(optimizer, self._params), random_states()
        optimizer.step()
        check_not_drawn(optimizer, drawn)
        for parameter in self.shared.model.parameters():
            parameter.grad = None
        after = look_at(optimizer, self._params)
        changed = [place for place in {**before, **after} if before.get(place) != after.get(place)]
        del held
        self._check_schedule(changed, scheduled)
        try:
            self._store_remembered(changed)
            for number in self._homes:
                self._store_state(number)
        except FormError as error:
            raise self._refused(str(error)) from None
        strangers = [
            key for key, state in optimizer.state.items() if state and key not in self._mine
        ]
        if strangers:
            raise self._refused(f"state[{_key_name(strangers[0])}]")

    def _value(self, place: Place) -> Any:
        return rebuild(
            self._kept.remembered[place],
            lambda key: _own(load_value(self._remembered[key.name], key)),
        )

    def _store_remembered(self, changed: Sequence[Place]) -> None:
        values = values_of(self.optimizer)
        for place in changed:
            form = self._kept.remembered.get(place)
            if form is None or place not in values:
                raise FormError(f"{place_name(place)}, which is no tensor or number")
            for key, value in leaves(form, values[place], place_name(place)):
                store_value(self._remembered[key.name], value)
            self._changed[self._places.index(place)] = 1

    def _check_schedule(
        self, changed: Sequence[Place], scheduled: Collection[tuple[int, str]]
    ) -> None:
        """Refuse an option that both the schedule and the optimizer change."""
        both = [
            place_name((f"param_groups[{number}]", name))
            for number, name in scheduled
            if (place := (f"param_groups[{number}]", name)) in changed
            or (place in self._places and self._changed[self._places.index(place)])
        ]
        if both:
            raise OptimizerError(
                f"{name_of(self.optimizer)} changes an option that the schedule sets, too",
                expected="options that one of both changes",
                found=", ".join(both),
                fix="leave out Task.scheduler, or the change in step()",
            )

    def _load_state(self, number: int) -> None:
        param = self.shared.blocks[number].param
        if self._present[number]:
            homes = self._homes[number]
            self.optimizer.state[self.shared.params[param]] = rebuild(
                self._kept.forms[param], lambda key: load_value(homes[key], key)
            )
        elif param in self._kept.initial:
            state = copy.deepcopy(self._kept.initial[param])
            self.optimizer.state[self.shared.params[param]] = state

    def _store_state(self, number: int) -> None:
        """Bring a parameter's state to its place, and let the optimizer see it there."""
        param = self.shared.blocks[number].param
        state = self.optimizer.state.get(self.shared.params[param])
        if not state:
            if self._present[number]:
                raise FormError(f"the state of {self.shared.names[param]} is gone")
            return
        form, homes = self._kept.forms[param], self._homes[number]
        elsewhere = False
        for key, value in leaves(form, state, f"the state of {self.shared.names[param]}"):
            home = homes[key]
            if isinstance(value, torch.Tensor) and value.data_ptr() != home.data_ptr():
                elsewhere = True
            store_value(home, value)
        if elsewhere:
            state.update(rebuild(form, lambda key: load_value(homes[key], key)))
        self._present[number] = 1

    def _refused(self, found: str) -> OptimizerError:
        return OptimizerError(
            f"{name_of(self.optimizer)} keeps state that cannot be shared",
            expected="tensors and numbers, and from the second step on always the same ones",
            found=f"changed by step(): {found}",
            fix=FIX,
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
    generator, drawn = torch.Generator().manual_seed(0), random_states()
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
    check_not_drawn(optimizer, drawn)
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
        state = dict(twin.state.pop(memo.get(id(parameter)), {}))
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
            found=f"changed by step(): state[{_key_name(others[0])}]",
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
    return UndividedState(forms=forms, remembered=remembered, initial=initial)


def check_not_drawn(optimizer: torch.optim.Optimizer, before: tuple[object, ...]) -> None:
    """Refuse an optimizer that has drawn random numbers since the states were these.

    Raises:
        OptimizerError: it has.
    """
    if before != random_states():
        raise OptimizerError(
            f"{name_of(optimizer)} draws random numbers in step()",
            expected="updates that depend on the gradients alone",
            found="the state of a global generator, changed by step()",
            fix="add the noise to the loss, which is seeded for each shard",
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


def place_name(place: Place) -> str:
    """An option or an attribute, as Python has it."""
    where, name = place
    return f"{where}[{name!r}]" if where.startswith("param_groups") else f"{where}.{name}"


def _key_name(key: object) -> str:
    return "a tensor" if isinstance(key, torch.Tensor) else repr(key)


def _own(value: Any) -> Any:
    """A tensor of the optimizer's own; in shared memory it would change before the others do."""
    return value.clone() if isinstance(value, torch.Tensor) else value
