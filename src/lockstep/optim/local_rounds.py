"""Local SGD rounds: optimizer steps of each shard on a copy of the model, between two exchanges.

Each shard has an optimizer of its own, whose state (Adam's averages, momentum) goes on from round
to round, as that of DiLoCo's inner optimizers does (Douillard et al., arXiv 2311.08105). It is a
part of the run's state, so whoever computes the shard next goes on with it. What a round makes of
it lies in the shard's slot, like its gradient, and gets to the state with the update: a round that
is begun again finds what it had found.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lockstep.errors import TaskError
from lockstep.job.loss_form import split_loss
from lockstep.job.task import Parameters
from lockstep.optim.introspection import check_known
from lockstep.optim.local_sgd import LocalSGD, ShardSamples, divide
from lockstep.optim.lr_schedule import LrSchedule
from lockstep.planning.byte_ranges import ByteRange, cut_evenly
from lockstep.planning.sampling import Sampling
from lockstep.state.gradient_slots import GradientSlot, as_tensor
from lockstep.state.logged_values import logged_means
from lockstep.state.module_state import Modes, PrivateBuffers
from lockstep.state.optimizer_state import StateKey, load_value, store_value
from lockstep.state.shard_outcomes import FIX
from lockstep.state.shared_state import SharedState, local_flags, local_name

LocalState = list[list[tuple[StateKey, torch.Tensor]]]
"""By trainable parameter: where each value of its optimizer state lies in a slot."""


@dataclass(frozen=True, kw_only=True)
class Updates:
    """Which of the updates within rounds end a data epoch, for the task's schedule."""

    sampling: Sampling
    steps: int

    @property
    def batch_size(self) -> int:
        """Samples of an update."""
        return self.sampling.batch_size // self.steps

    def ends_epoch(self, step: int) -> bool:
        """Whether an update is the last of a round that ends a data epoch."""
        number, update = divmod(step, self.steps)
        return update == self.steps - 1 and self.sampling.ends_epoch(number)


class LocalRounds:
    """One worker's: a copy of the model, and the task's optimizer and schedule on it."""

    def __init__(
        self,
        task: LocalSGD,
        shared: SharedState,
        sampling: Sampling,
        clip_grad_norm: float | None,
    ) -> None:
        """`clip_grad_norm`: limit of the norm of the gradient that a step within a round takes."""
        self._round = task
        self.task, self.steps, self.shared = task.task, task.steps, shared
        self._most = clip_grad_norm
        self._model = _copy(shared.model)
        trainable = [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]
        self._params = [parameter for _, parameter in trainable]
        self._optimizer = self.task.optimizer(Parameters(trainable))
        self._initial = {p: copy.deepcopy(s) for p, s in self._optimizer.state.items()}
        updates = Updates(sampling=sampling, steps=task.steps)
        self._schedule = LrSchedule(self.task, self._optimizer, updates, waits=False)
        self._modes = Modes(self._model)
        self._buffers = PrivateBuffers(self._model, list(self._model.named_buffers()))

    def loss(
        self, step: int, shard: int, slot: GradientSlot, batch: ShardSamples
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """The mean loss over a shard's steps; its gradient is how far these have come, and the slot
        gets what the optimizer keeps. Beside it the means of what the task logs."""
        begun, local_state = self._local_state(slot)
        self._begin(shard, slot, begun, local_state)
        total, logged = torch.zeros((), dtype=torch.float64), dict[str, float]()
        for update, samples in enumerate(divide(batch.samples, self.steps)):
            self._schedule.go_to(step * self.steps + update)
            self._optimizer.zero_grad(set_to_none=True)
            self._round.begin_update(update)
            loss, beside = split_loss(self.task.loss(self._model, self.task.collate(samples)))
            means = logged_means(beside, len(samples), absent=False)
            if update and means.keys() != logged.keys():
                raise _other_names(step, shard, logged, means)
            for name, value in means.items():
                logged[name] = logged.get(name, 0.0) + value * len(samples)
            loss.backward()
            if self._most is not None:
                nn.utils.clip_grad_norm_(self._params, self._most)
            self._optimizer.step()
            total += loss.detach().double() * len(samples)
        self._optimizer.zero_grad(set_to_none=True)
        self._keep(begun, local_state)
        params = self.shared.params
        with torch.no_grad():
            deltas = [p - moved for p, moved in zip(params, self._params, strict=True)]
        mean = (total / len(batch.samples)).float()
        found: torch.Tensor = _KnownGradient.apply(mean, deltas, *params)  # type: ignore[no-untyped-call]
        return found, {name: value / len(batch.samples) for name, value in logged.items()}

    def _begin(
        self, shard: int, slot: GradientSlot, begun: torch.Tensor, local_state: LocalState
    ) -> None:
        """Start from the committed parameters and buffers, and the shard's optimizer state."""
        with torch.no_grad():
            for local, committed in zip(self._params, self.shared.params, strict=True):
                local.copy_(committed)
        self._buffers.restore(self.shared.committed)
        self._modes.restore()
        run = self.shared.local[shard]
        slot.local.copy_(self.shared.state_bytes[run.offset : run.offset + run.nbytes])
        self._optimizer.state.clear()
        for index, parameter in enumerate(self._params):
            if begun[index]:
                self._optimizer.state[parameter] = {
                    key.name: load_value(stored, key) for key, stored in local_state[index]
                }
            elif parameter in self._initial:
                self._optimizer.state[parameter] = copy.deepcopy(self._initial[parameter])

    def _keep(self, begun: torch.Tensor, local_state: LocalState) -> None:
        """Leave in the slot what the optimizer keeps, and in the model what the buffers are."""
        for index, parameter in enumerate(self._params):
            state = self._optimizer.state.get(parameter)
            if not state:
                continue
            begun[index] = 1
            check_known(self._optimizer, state, [key for key, _ in local_state[index]])
            for key, stored in local_state[index]:
                store_value(stored, state[key.name])
        for (_, own), moved in zip(self.shared.buffers, self._buffers.values(), strict=True):
            own.copy_(moved)

    def _local_state(self, slot: GradientSlot) -> tuple[torch.Tensor, LocalState]:
        """Where a slot says which parameters have state, and where that is."""
        first = self.shared.local[0].offset

        def view(name: str) -> torch.Tensor:
            entry = self.shared.layout.entry(name)
            offset = entry.offset - first
            return as_tensor(slot.local, offset, entry.dtype, entry.shape, entry.stride)

        local_state = [
            [(key, view(local_name(0, name, key))) for key in keys]
            for name, keys in zip(self.shared.names, self.shared.local_keys, strict=True)
        ]
        return view(local_flags(0)), local_state


def _other_names(step: int, shard: int, before: Iterable[str], found: Iterable[str]) -> TaskError:
    return TaskError(
        f"Task.loss returned other values beside the loss within shard {shard} of step {step}",
        expected=", ".join(before) or "none",
        found=", ".join(found) or "none",
        fix=FIX,
    )


class LocalUpdate:
    """One worker's part in the update of what shards' optimizers keep. Made anew when the
    membership changes."""

    def __init__(self, shared: SharedState, host_shards: range, rank: int, workers: int) -> None:
        """`host_shards` are the shards that this host computes."""
        state = memoryview(shared.segments["state"].map)
        slots = memoryview(shared.segments["slots"].map)
        self.ranges: list[ByteRange] = []
        """What it changes of the state segment."""
        self._copies: dict[int, tuple[memoryview, memoryview]] = {}
        for shard in host_shards if shared.local else ():
            whole = shared.local[shard]
            part = cut_evenly(whole, workers)[rank]
            start = shared.slot_offset(shard) + part.offset - whole.offset
            self.ranges.append(part)
            self._copies[shard] = (
                state[part.offset : part.offset + part.nbytes],
                slots[start : start + part.nbytes],
            )

    def run(self, active: Iterable[int]) -> None:
        """Make the state what the step's shards have left in their slots."""
        for shard in active:
            if shard in self._copies:
                kept, found = self._copies[shard]
                kept[:] = found


def _copy(model: nn.Module) -> nn.Module:
    """A copy in memory of its own, with gradients that its own optimizer takes."""
    local = copy.deepcopy(model)
    for module in local.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = False  # as it may be run for the exchange (see `embedding_tables`)
    return local


class _KnownGradient(torch.autograd.Function):
    """A number whose gradient, with regard to each parameter, is known already."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, deltas: list[torch.Tensor], *_: Any) -> torch.Tensor:
        ctx.deltas = deltas
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        return None, None, *(delta * grad.to(delta.dtype) for delta in ctx.deltas)
