"""Forward and backward of one shard: its gradient, in a slot, and its loss."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from lockstep.collectives.barrier import Regroup
from lockstep.data.loader import Loader
from lockstep.device.device import Device
from lockstep.errors import LockstepError, NonFiniteError, TaskError
from lockstep.job.loss_form import split_loss
from lockstep.job.position import Position
from lockstep.job.task import Task
from lockstep.optim.local_rounds import LocalRounds
from lockstep.planning.sampling import Sampling, describe_samples
from lockstep.slices.board import PassRestarted
from lockstep.state.buffer_rules import BufferWatch
from lockstep.state.fault_injection import FaultInjector
from lockstep.state.gradient_slots import GradientSlot
from lockstep.state.logged_values import logged_means
from lockstep.state.module_state import Modes, PrivateBuffers
from lockstep.state.shard_outcomes import ShardOutcome
from lockstep.state.shared_state import SharedState
from lockstep.system.own_generators import OwnGenerators
from lockstep.system.seeding import derive
from lockstep.worker.compiled_shard import CompiledPasses, CompiledShard
from lockstep.worker.gradient_hooks import GradientHooks
from lockstep.worker.lone_samples import LoneSamples
from lockstep.worker.loss_capture import tensors_of
from lockstep.worker.model_checks import held_tensors
from lockstep.worker.shard_tracer import PlainPass, ShardTracer
from lockstep.worker.sparse_autograd import Redo
from lockstep.worker.traced_shard import TracedShard


class TeamPass(Protocol):
    """A member's part in a shard that its team computes."""

    def begin(self, phase: str) -> None:
        """A phase of the shard begins: `forward` or `backward`."""

    def again(self) -> None:
        """The shard is computed once more, by all members."""

    def finish(self, outcome: ShardOutcome) -> None:
        """This member's part is done: wait for the others."""


class ForwardBackward:
    """One worker's. Nothing that it makes depends on what it has made before."""

    early = False
    """Whether other hosts get gradients of this worker's own slots as they come."""
    team: TeamPass | None = None
    """The team with which a shard is computed just now, if it is not computed alone."""
    froze_at = -1
    """The last step that has changed which parameters require gradients."""

    def __init__(
        self,
        task: Task,
        shared: SharedState,
        sampling: Sampling,
        loader: Loader,
        rounds: LocalRounds | None,
        generators: OwnGenerators,
        device: Device,
        *,
        start: Position,
        seed: int,
        autocast: bool,
        faults: FaultInjector,
        tracer: ShardTracer | CompiledPasses | None = None,
    ) -> None:
        """`rounds` replaces the task's loss, where a step is a round of local ones.
        `start` is the run's beginning. Without a `tracer` all passes are plain."""
        self.task, self.shared, self.sampling, self.loader = task, shared, sampling, loader
        self.device, self.seed, self.autocast, self.faults = device, seed, autocast, faults or None
        self._tracer = tracer
        self._rounds = rounds
        self._start = start if type(task).set_position is not Task.set_position else None
        self._fetching = 0.0
        self._writer = GradientHooks(shared)
        self._buffers = PrivateBuffers(shared.model, shared.buffers)
        self._watch = BufferWatch(
            shared.model, shared.committed, shared.buffer_rules, len(shared.slots)
        )
        self._modes = Modes(shared.model)
        self._generators = generators
        self._frozen = [
            (name, p) for name, p in shared.model.named_parameters() if not p.requires_grad
        ]
        self._trainable = [True] * len(shared.params)
        self._lone_samples = LoneSamples(shared.model, sampling, start.steps)
        self._kept = [*shared.model.named_parameters(), *held_tensors(task, shared.model)]
        self._roots: dict[tuple[float, torch.dtype, torch.Size], torch.Tensor] = {}

    def pop_fetching_seconds(self) -> float:
        """For how many seconds batches were waited for since the last call."""
        fetching, self._fetching = self._fetching, 0.0
        return fetching

    @contextlib.contextmanager
    def plainly(self, loader: Loader) -> Iterator[None]:
        """Take batches from another loader, and trace nothing."""
        kept = self.loader, self._tracer
        self.loader, self._tracer = loader, None
        try:
            yield
        finally:
            self.loader, self._tracer = kept

    @contextlib.contextmanager
    def in_team(self, team: TeamPass, others: frozenset[int]) -> Iterator[None]:
        """Compute a shard with a team, which is never traced. `others`: the parameters whose
        gradients other members write."""
        with self.plainly(self.loader):
            self.team, self._writer.others = team, others
            try:
                yield
            except BaseException:
                self._writer.abandon()
                raise
            finally:
                self.team, self._writer.others = None, frozenset()

    def make(
        self, step: int, shard: int, slot: GradientSlot, written: npt.NDArray[np.uint8]
    ) -> ShardOutcome:
        """Forward and backward of one shard, into a slot; returns the loss and what is logged
        beside it. An error of the user's code names the shard's samples."""
        try:
            return self._make(step, shard, slot, written)
        except Regroup:
            raise
        except BaseException as error:  # the user's code may call sys.exit()
            samples = describe_samples(self.loader.samples(step, shard))
            if isinstance(error, NonFiniteError):
                error.found += f"; the shard's samples are {samples}"
            elif not isinstance(error, LockstepError):
                error.add_note(f"Its samples (indices into the training set): {samples}")
            raise

    def _make(
        self, step: int, shard: int, slot: GradientSlot, written: npt.NDArray[np.uint8]
    ) -> ShardOutcome:
        begun = time.perf_counter()
        self._fault("load", step, shard)
        batch = self.device.place(self.loader.get(step, shard))
        self._fetching += time.perf_counter() - begun
        if self._tracer is not None:
            traced = self._tracer.find(batch)
            if traced is not None:
                return self._run_traced(traced, step, shard, batch, slot, written)
        while True:
            try:
                begun = time.perf_counter()
                loss, logged = self._differentiate(step, shard, batch, slot, written)
                taken = time.perf_counter() - begun
                if self.team is not None:
                    self.team.finish(ShardOutcome(loss.item(), logged))
                break
            except (Redo, PassRestarted):  # an embedding was found to need its dense form
                self._writer.abandon()
                if self.team is not None:
                    self.team.again()
                # The loss may have changed it.
                batch = self.device.place(self.loader.get(step, shard))
        if logged:  # a list of kernels gives the loss alone
            return ShardOutcome(loss.item(), logged)
        tracer = self._tracer
        if isinstance(tracer, ShardTracer) and tracer.note(batch, taken, self.loader.last - step):
            self._trace(tracer, step, shard, loss, slot, written)
        return ShardOutcome(loss.item(), {})

    def _run_traced(
        self,
        traced: TracedShard | CompiledShard,
        step: int,
        shard: int,
        batch: Any,
        slot: GradientSlot,
        written: npt.NDArray[np.uint8],
    ) -> ShardOutcome:
        """As `_differentiate`. What it checks after the pass a captured loss cannot do."""
        self._fault("forward", step, shard)
        if traced.draws:
            self.device.seed(derive(self.seed, "shard", step, shard))
        self._buffers.restore(self.shared.committed)
        written[:] = traced.flags
        root = self._root(self.sampling.weights(step)[shard], traced.captured.loss)
        value = traced.run(tensors_of(batch), root, slot)
        self._fault("backward", step, shard)
        if not math.isfinite(value):
            raise _not_finite(value, step, shard, self.sampling)
        self._buffers.save(slot.buffers)
        self._watch.check(slot.buffers, step)
        if self._is_early(shard, slot):
            self._writer.all_are_there(step, shard, written)
        return ShardOutcome(value, {})

    def _is_early(self, shard: int, slot: GradientSlot) -> bool:
        """Whether other hosts may have this shard's gradients before all workers have met."""
        return self.early and slot is self.shared.slots[shard]

    def _trace(
        self,
        tracer: ShardTracer,
        step: int,
        shard: int,
        loss: torch.Tensor,
        slot: GradientSlot,
        written: npt.NDArray[np.uint8],
    ) -> None:
        """Trace batches such as that of this shard, which has just been computed."""
        tracer.trace(
            fresh=lambda: self.device.place(self.loader.get(step, shard)),
            seed=lambda: self.device.seed(derive(self.seed, "shard", step, shard)),
            root=self._root(self.sampling.weights(step)[shard], loss),
            plain=PlainPass(loss=loss.item(), slot=slot, written=written),
        )

    def _differentiate(
        self, step: int, shard: int, batch: Any, slot: GradientSlot, written: npt.NDArray[np.uint8]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Forward and backward of a batch, under the shard's seed, from the committed buffers;
        returns the loss, and what is logged beside it."""
        seed = derive(self.seed, "shard", step, shard)
        self._generators.seed(seed)  # first: set_position may seed them itself
        if self._start is not None:
            start, stop = self.sampling.shard_span(step, shard)
            self.task.set_position(self._start.at_step(step, stop - start))
        self.device.seed(seed)
        self._buffers.restore(self.shared.committed)
        self._modes.restore()
        versions = [tensor._version for _, tensor in self._kept]
        early = (step, shard) if self._is_early(shard, slot) else None
        self._writer.begin(slot, written, early)
        self._fault("forward", step, shard)
        if self.team is not None:
            self.team.begin("forward")
        with self._precision():
            if self._rounds is None:
                first, last = self.sampling.shard_span(step, shard)
                with self._lone_samples.watching(last - first):
                    loss, beside = split_loss(self.task.loss(self.shared.model, batch))
                absent = len(self.shared.slots) == 1
                logged = logged_means(beside, last - first, absent=absent) if beside else {}
            else:
                loss, logged = self._rounds.loss(step, shard, slot, batch)
        check_loss(loss, step, shard, self.sampling)
        weight = self.sampling.weights(step)[shard]
        self._fault("backward", step, shard)
        if self.team is not None:
            self.team.begin("backward")
        loss.backward(None if weight == 1 else self._root(weight, loss))
        self._writer.finish()
        self.device.confirm(step, shard)
        self._buffers.save(slot.buffers)
        self._watch.check(slot.buffers, step)
        if versions != [tensor._version for _, tensor in self._kept]:
            raise self._changed(versions)
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise _unfrozen(name, step)
        trainable = [parameter.requires_grad for parameter in self.shared.params]
        if trainable != self._trainable:
            self._trainable, self.froze_at = trainable, step
        return loss.detach(), logged

    def _changed(self, versions: list[int]) -> TaskError:
        changed = [
            name
            for (name, tensor), version in zip(self._kept, versions, strict=True)
            if tensor._version != version
        ]
        return TaskError(
            "the loss changed tensors that outlive it: who computes which shard would count",
            expected="parameters that only the optimizer changes, and a task that stays as it is",
            found=", ".join(changed[:5]),
            fix="keep what the loss changes in a buffer of the model, leave out max_norm of "
            "embeddings, and put a module that the task holds in eval mode",
        )

    def _precision(self) -> contextlib.AbstractContextManager[object]:
        if self.autocast:
            return self.device.autocast()
        return contextlib.nullcontext()

    def _root(self, weight: float, loss: torch.Tensor) -> torch.Tensor:
        """The shard's share of the step, as the gradient at the root of the graph, of the loss's
        form.

        Weighting here and not after the sum costs nothing, and one shard alone has weight 1: then
        `loss.backward()` makes the same.
        """
        key = (weight, loss.dtype, loss.shape)
        if key not in self._roots:
            self._roots[key] = torch.full(loss.shape, weight, dtype=loss.dtype, device=loss.device)
        return self._roots[key]

    def _fault(self, phase: str, step: int, shard: int) -> None:
        """Let a scripted fault strike here."""
        if self.faults is not None:
            self.faults.at(phase, step, shard)


def _unfrozen(name: str, step: int) -> TaskError:
    return TaskError(
        f"parameter {name} was frozen when the run began, and is not any more: it would never be "
        "trained",
        expected="every parameter that is ever to be trained to require gradients at the start",
        found=f"requires_grad=True at step {step}",
        fix="leave it trainable in Task.model(), and in each call of loss set requires_grad from "
        "the step that set_position was told: layer.requires_grad_(self.step >= 100)",
    )


def check_loss(loss: object, step: int, shard: int, sampling: Sampling) -> float:
    """The loss as a number.

    Raises:
        TaskError: it is not a scalar tensor with a graph.
        NonFiniteError: it is NaN or infinite.
    """
    usable = isinstance(loss, torch.Tensor) and loss.requires_grad and loss.is_floating_point()
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not usable:
        found = (
            f"a tensor of shape {tuple(loss.shape)}, {loss.dtype}, "
            f"requires_grad={loss.requires_grad}"
            if isinstance(loss, torch.Tensor)
            else repr(type(loss))
        )
        raise TaskError(
            "Task.loss did not return a loss",
            expected="a real tensor of one element, with a graph: the mean over the batch; or a "
            "pair of it and a mapping of what is to be logged",
            found=found,
            fix="return, for instance, torch.nn.functional.cross_entropy(model(x), y)",
        )
    value = loss.item()
    if not math.isfinite(value):
        raise _not_finite(value, step, shard, sampling)
    return value


def _not_finite(value: float, step: int, shard: int, sampling: Sampling) -> NonFiniteError:
    return NonFiniteError(
        f"the loss is {value} at step {step}, shard {shard}: the step was not committed",
        expected="a finite loss",
        found=f"{value}, data epoch {sampling.data_epoch(step)}",
        fix="lower the learning rate, set clip_grad_norm, or look at the batch's samples",
    )
