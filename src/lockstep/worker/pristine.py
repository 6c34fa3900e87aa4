"""Pristine fork: computes shards in a process in which nothing has been computed before.

What it leaves is compared, part by part, with what another process has left of the same shard. The
same bytes are expected whatever either has computed before: else the user's objects remember.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
from blake3 import blake3

from lockstep.data.fetching import AbsentSamples, make_fetch
from lockstep.data.loader import Loader
from lockstep.device.shared import SharedDevice
from lockstep.errors import ProtocolError, TaskError
from lockstep.optim.local_rounds import LocalRounds
from lockstep.optim.local_sgd import LocalSGD
from lockstep.planning.metric_decisions import Told
from lockstep.state.fault_injection import FaultInjector
from lockstep.state.gradient_slots import GradientSlot
from lockstep.state.shard_outcomes import NOTHING, ShardOutcome
from lockstep.state.shared_state import SharedState
from lockstep.system import numerics
from lockstep.system.machine import available_bytes
from lockstep.system.messages import Codec, ErrorMessage, Message
from lockstep.system.object_graph import walk
from lockstep.worker.audit import private_copy
from lockstep.worker.context import Session
from lockstep.worker.error_report import describe_error
from lockstep.worker.evaluate import Inference, evaluate_batches
from lockstep.worker.forward_backward import ForwardBackward

DIGEST = 16
"""Bytes."""
MOST_BYTES = 1 << 28
"""Larger tensors of the user's objects are not digested."""
Digests = Mapping[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Work:
    """A shard to be computed."""

    step: int
    shard: int
    samples_of: tuple[int, int] | None = None
    """The step and shard whose samples are taken, where they are not its own."""
    told: tuple[Told, ...] = ()
    """What the task's schedule has been told, where it waits for a metric."""


class Outcome(Message):
    """What a pristine fork left."""

    parts: dict[str, bytes] = msgspec.field(default_factory=dict)
    """Digests of the loss, and of every gradient and buffer."""
    held: dict[str, bytes] = msgspec.field(default_factory=dict)
    """Digests of what the user's objects hold, by path, if that was asked for."""
    error: ErrorMessage | None = None


OUTCOMES: Codec[Outcome] = Codec(Outcome)


def has_room(shared: SharedState) -> bool:
    """Whether there is memory enough for one more process that computes."""
    return available_bytes() > 4 * shared.slots[0].flat.numel()


def compute(
    session: Session, works: Sequence[Work], slot: GradientSlot | None, *, explain: bool
) -> Outcome:
    """Compute shards, one after the other; what the last one left. Called in a fork of its own.

    `slot`: where gradients go, before the first step; the metrics of a held-out batch are computed
    then, too. None: to memory of the fork's own.
    """
    plan, shared = session.plan, session.shared
    numerics.configure(plan.threads)
    rounds: LocalRounds | None = None
    if isinstance(session.task, LocalSGD):
        rounds = LocalRounds(session.task, shared, plan.sampling, plan.clip_grad_norm)
    loader = _Fetching(
        session.fetch, plan.sampling, loaders=0, spare_cores=0, last=plan.steps, part=plan.part,
        rule=session.order_rule,
    )  # fmt: skip
    forward_backward = ForwardBackward(
        session.task, shared, plan.sampling, loader, rounds, session.generators,
        SharedDevice(), start=plan.position, seed=plan.seed, autocast=plan.precision == "bf16",
        faults=FaultInjector((), -1, shared.control), tracer=session.compiled,
    )  # fmt: skip
    target = private_copy(shared.slots[0]) if slot is None else slot
    flags, outcome = np.zeros_like(shared.control.has_grad[0]), NOTHING
    try:
        for work in works:
            loader.samples_of = work.samples_of
            session.schedule.tell(work.told)
            session.schedule.go_to(work.step)
            outcome = forward_backward.make(work.step, work.shard, target, flags)
    except BaseException as error:  # the user's code may call sys.exit()
        return Outcome(error=describe_error(error, f"computing step {works[-1].step}"))
    parts = digest_parts(shared, target, flags, outcome)
    if slot is not None:
        with contextlib.suppress(BaseException):  # workers will meet the same, and tell of it
            parts |= _of_held_out(session)
    held = digest_held(session.task, session.train, shared) if explain else {}
    return Outcome(parts=parts, held=held)


def _of_held_out(session: Session) -> dict[str, bytes]:
    """A digest of the metrics and outputs of the first held-out batch."""
    plan = session.plan
    samples, _ = plan.own_held_out
    if not samples or session.held_out is None:
        return {}
    position = plan.position.at_batch(0, 0, plan.position.samples)
    absent = AbsentSamples(allowed=True)
    fetch = make_fetch(session.task, session.held_out, plan.seed, absent)
    with Inference(
        session.task, session.shared, session.generators, SharedDevice(), position, plan.seed,
        autocast=plan.precision == "bf16",
    ) as inference:  # fmt: skip
        size = {"samples": samples, "batch_size": plan.eval_batch_size}
        (found,) = evaluate_batches(inference, fetch, absent, [0], **size)
    return {"the metrics of a held-out batch": _digest(repr(found).encode())}


class _Fetching(Loader):
    """A loader that fetches what is asked for, in this process."""

    samples_of: tuple[int, int] | None = None

    def get(self, step: int, shard: int) -> Any:
        work = self.samples_of or (step, shard)
        return self.fetch(self.sampling.data_epoch(step), self.samples(*work), self.repeats(*work))


def digest_parts(
    shared: SharedState, slot: GradientSlot, flags: Any, outcome: ShardOutcome
) -> dict[str, bytes]:
    """Digests of what a shard left, each under its name in messages."""
    parts = {"the loss": _digest(np.float64(outcome.loss).tobytes())}
    for name, value in outcome.logged.items():
        parts[f"the logged value {name}"] = _digest(np.float64(value).tobytes())
    for index, name in enumerate(shared.names):
        if flags[index]:
            parts[f"the gradient of {name}"] = _of_tensor(slot.dense(index))
    for (name, _), buffer in zip(shared.buffers, slot.buffers, strict=True):
        parts[f"buffer {name}"] = _of_tensor(buffer)
    parts["what its own optimizer keeps"] = _of_tensor(slot.local)
    return parts


def digest_held(task: object, train: object, shared: SharedState) -> dict[str, bytes]:
    """Digests of what the user's objects hold, by path."""
    roots = {"data": train, "task": task, "model": shared.model}
    held = {path: _of_value(value) for path, value in walk(roots)}
    for name, parameter in shared.model.named_parameters():
        held[f"model.{name}.requires_grad"] = _of_value(parameter.requires_grad)
    return held


def _of_value(value: object) -> bytes:
    if isinstance(value, torch.Tensor):
        few = value.layout is torch.strided and value.numel() * value.dtype.itemsize < MOST_BYTES
        return _of_tensor(value.detach()) if few else b""
    if isinstance(value, np.ndarray):
        return (
            _digest(value.tobytes()) if value.nbytes < MOST_BYTES and value.dtype != object else b""
        )
    if isinstance(value, bool | int | float | complex | str | bytes | np.generic | None):
        return _digest(repr(value).encode(errors="replace"))
    if isinstance(value, dict | list | tuple | set | frozenset):
        return _digest(f"{type(value)} {len(value)}".encode())
    cache = getattr(value, "cache_info", None) if not isinstance(value, type) else None
    if cache is not None and hasattr(value, "__wrapped__"):
        return _digest(repr(cache()).encode())
    if type(value).__module__ == "itertools":
        return _digest(repr(value).encode())
    return _of_stream(value)


def _of_stream(value: object) -> bytes:
    """How far a generator of random numbers, or an open file, has come."""
    if isinstance(value, random.Random):
        return _digest(repr(value.getstate()).encode())
    if isinstance(value, np.random.Generator):
        return _digest(repr(value.bit_generator.state).encode())
    if isinstance(value, np.random.RandomState):
        return _digest(repr(value.get_state(legacy=False)).encode())
    if isinstance(value, torch.Generator):
        return _of_tensor(value.get_state())
    if isinstance(value, io.IOBase):
        with contextlib.suppress(OSError, ValueError):  # it is a pipe, or closed
            return _digest(str(value.tell()).encode())
    return b""


def _of_tensor(tensor: torch.Tensor) -> bytes:
    return _digest(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _digest(data: Any) -> bytes:
    return blake3(data).digest(DIGEST)


def write_outcome(fd: int, outcome: Outcome) -> None:
    """Leave an outcome in a file, for who waits for the fork's end."""
    with open(fd, "wb", closefd=False) as file:
        file.write(OUTCOMES.encode(outcome))


def read_outcome(fd: int) -> Outcome | None:
    """What a pristine fork has left; None: it was killed before it was ready."""
    size = os.fstat(fd).st_size
    try:
        return OUTCOMES.decode(os.pread(fd, size, 0)) if size else None
    except ProtocolError:
        return None


def differing(left: Digests, right: Digests) -> list[str]:
    """The names under which the digests differ, or of which there is only one."""
    return [name for name in {**left, **right} if left.get(name) != right.get(name)]


def changed_paths(left: Digests, right: Digests) -> list[str]:
    """The paths at which the user's objects hold something else."""
    found: list[str] = []
    for path in differing(left, right):
        if not any(path.startswith((f"{above}[", f"{above}.")) for above in found):
            found.append(path)
    return found


def impure(where: str, one: Outcome, other: Outcome) -> TaskError:
    """What to raise where two processes computed the same shard, after different others."""
    paths = changed_paths(one.held, other.held)
    holds = f"; what has changed meanwhile: {listed(paths)}" if paths else ""
    failed = other.error or one.error
    found = listed(differing(one.parts, other.parts)) if failed is None else failed.what
    return TaskError(
        "something remembers: what a shard gives depends on what its process computed before, so "
        "the numbers would depend on the number of workers",
        expected="the same loss, gradients and buffers in a process that has computed nothing and "
        "in one that has computed other shards",
        found=f"{where}: {found}{holds}",
        fix="keep what has to be remembered in a buffer of the model, or compute it from the "
        "sample's index or from set_position; change nothing in place that outlives the shard; "
        "`purity: 0` trains without this check, and without the promise",
    )


def random_results(where: str, one: Outcome, other: Outcome) -> TaskError:
    """What to raise where two processes did the very same, with different results."""
    return TaskError(
        "two processes that computed the very same shard got different results",
        expected="random numbers that are seeded, and nothing that depends on the process or the "
        "time",
        found=f"{where}: {listed(differing(one.parts, other.parts))}",
        fix="draw from the global generators of torch, NumPy or random, or from one that the data "
        "set or the task keeps: these are seeded. np.random.default_rng() made anew in each "
        "call, os.urandom, the clock and the order of a set of objects are not; "
        "`purity: 0` trains without this check, and without the promise",
    )


def listed(names: Sequence[str]) -> str:
    """The first few names."""
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
