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

from lockstep.errors import OptimizerError
from lockstep.optim.known_optimizers import name_of
from lockstep.optim.remembered import (
    check_not_drawn,
    key_name,
    look_at,
    place_name,
    set_value,
    values_of,
)
from lockstep.optim.undivided_trial import FIX
from lockstep.state.optimizer_state import load_value, store_value
from lockstep.state.shared_state import CHANGED, PRESENT, SharedState, remembered_name
from lockstep.state.state_form import (
    FormError,
    Place,
    is_same,
    leaves,
    rebuild,
)
from lockstep.system.seeding import generator_states


class UndividedUpdate:
    """Steps the whole optimizer. Made anew when the membership changes."""

    def __init__(
        self, shared: SharedState, numbers: Sequence[int], scheduled: Collection[tuple[int, str]]
    ) -> None:
        """`numbers`: the blocks, each a whole parameter, that the optimizer has. `scheduled`: the
        options, by group, that the schedule sets; there may be more of them later."""
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
        self._scheduled = scheduled
        for index, place in enumerate(self._places):
            if not self._changed[index]:
                self._reset_value(place)
        for number in numbers:
            self._load_state(number)

    def step(self) -> None:
        """Step once. The parameters hold their gradients.

        Raises:
            OptimizerError: the step has changed what cannot be kept.
        """
        optimizer = self.optimizer
        for index, place in enumerate(self._places):
            if self._changed[index]:
                set_value(optimizer, place, self._value(place))
        held = values_of(optimizer)  # so that no new object has an old one's identity
        before, drawn = look_at(optimizer, self._params), generator_states()
        optimizer.step()
        check_not_drawn(name_of(optimizer), drawn)
        for parameter in self.shared.model.parameters():
            parameter.grad = None
        after = look_at(optimizer, self._params)
        changed = [place for place in {**before, **after} if before.get(place) != after.get(place)]
        del held
        self._check_schedule(changed)
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
            raise self._refused(f"state[{key_name(strangers[0])}]")

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

    def _reset_value(self, place: Place) -> None:
        """Undo a change that the run has gone back behind. What the schedule sets it sets anew."""
        if place in self._scheduled_places() or place not in self._kept.initial_values:
            return
        form, initial = self._kept.remembered[place], self._kept.initial_values[place]
        if not is_same(form, values_of(self.optimizer).get(place), initial):
            set_value(self.optimizer, place, copy.deepcopy(initial))

    def _scheduled_places(self) -> list[Place]:
        return [(f"param_groups[{number}]", name) for number, name in self._scheduled]

    def _check_schedule(self, changed: Sequence[Place]) -> None:
        """Refuse an option that both the schedule and the optimizer change."""
        both = [
            place_name(place)
            for place in self._scheduled_places()
            if place in changed
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
        else:
            self.optimizer.state.pop(self.shared.params[param], None)

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


def _own(value: Any) -> Any:
    """A tensor of the optimizer's own; in shared memory it would change before the others do."""
    return value.clone() if isinstance(value, torch.Tensor) else value
