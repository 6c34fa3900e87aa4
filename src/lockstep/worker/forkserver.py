"""Forkserver: preloads torch and the task, then forks workers in milliseconds.

A fork starts with everything loaded and shared memory mapped, so a dead worker is replaced at once.
The forkserver itself computes nothing and starts no thread: forking stays safe. It serves one agent
(see `planning.forkserver_messages`), and ends, with all its workers, when the agent's end of the
channel closes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lockstep.errors import ResourceError
from lockstep.job.task_source import TaskSource
from lockstep.planning.forkserver_messages import (
    CheckPurity,
    ChildExited,
    CloneServer,
    ForkWorker,
    JobMeasured,
    LoadTask,
    MeasureJob,
    Preload,
    Preloaded,
    PurityChecked,
    Request,
    ServerCloned,
    SetUp,
    ShardForked,
    StateReady,
    TaskLoaded,
    ToClient,
    ToComputing,
    ToPristine,
    WorkerForked,
    to_client,
    to_computing,
    to_pristine,
)
from lockstep.planning.worker_messages import to_agent
from lockstep.system import numerics, torch_patches
from lockstep.system.machine import give_back_freed_memory
from lockstep.system.process_title import set_title
from lockstep.system.processes import ends_within
from lockstep.system.unix_channel import Channel, Closed
from lockstep.worker.fork_setup import flush, in_child

if TYPE_CHECKING:
    from lockstep.worker.context import Session
    from lockstep.worker.load_task import Loaded
    from lockstep.worker.pristine import Work

END_SECONDS = 2.0
"""How long killed children are waited for; less than the agent waits for this process."""
NEEDED = ("torch", "torch._dynamo", "lockstep.worker.main")
"""What every run imports: an optimizer's first step needs the compiler to say that it is not meant.
"""


def import_needed() -> None:
    """Import what every run needs, and keep it out of the collector's sight from then on.

    To look through it again and again while it grows takes a quarter of the time, and what the
    collector looks at in a fork is copied.
    """
    gc.disable()
    try:
        for name in NEEDED:
            importlib.import_module(name)
    finally:
        gc.enable()
    gc.freeze()


class ForkServer:
    """The state of the process, and one method per request."""

    def __init__(self, channel: ToClient) -> None:
        self.channel = channel
        self.children: set[int] = set()
        """Process ids of workers, clones and pristine forks."""
        self.computing: dict[int, ToComputing] = {}
        """By descriptor: workers that may ask for shards to be computed once more."""
        self.computed_by: dict[int, int] = {}
        """By the same: the fork that did so last."""
        self.loaded: Loaded
        """By `load`."""
        self.session: Session | None = None

    def answer(self, request: Request, fds: list[int]) -> bool:
        """Do what is asked for; true in a clone that this makes, which serves another agent."""
        match request:
            case Preload():
                self.preload()
            case LoadTask():
                self.load(request, fds)
            case SetUp():
                self.set_up(request)
            case ForkWorker():
                self.fork_worker(request.worker_id)
            case CheckPurity():
                self.check_purity()
            case MeasureJob():
                self.measure_job(request)
            case CloneServer():
                return self.clone(request, fds)
        return False

    def preload(self) -> None:
        """Import what every run needs."""
        import_needed()
        numerics.configure(threads=1)
        self.channel.send(Preloaded())

    def load(self, request: LoadTask, fds: list[int]) -> None:
        """Import torch, build the task, its model and its data sets."""
        os.chdir(request.folder)
        sys.path[:] = map(os.fsdecode, request.search_path)
        sys.argv[:] = map(os.fsdecode, request.argv)
        sent = fds.pop() if request.data_bytes else -1
        payload = None
        if request.has_payload:
            with open(fds[0], "rb") as file:
                file.seek(0)
                payload = file.read()
        import_needed()
        numerics.configure(threads=1)
        torch_patches.keep_to_one_thread()
        from lockstep.data.dataset_shipping import write_sets
        from lockstep.worker.load_task import load

        source = TaskSource(
            name=os.fsdecode(request.name),
            args=json.loads(request.args),
            payload=payload,
            code=request.code,
            folder=os.fsdecode(request.code_folder),
            offered=request.offered,
            functions=request.functions,
        )
        set_title("forkserver", source.label)
        self.loaded = load(source, request, sent)
        facts = json.dumps(self.loaded.facts)
        if self.loaded.ships:
            loaded = self.loaded
            sets = write_sets(loaded.train, loaded.held_out, loaded.order_rule)
            with contextlib.closing(sets):
                self.channel.send(TaskLoaded(facts=facts, data_bytes=sets.nbytes), [sets.fd])
        else:
            self.channel.send(TaskLoaded(facts=facts, data_bytes=0))

    def set_up(self, request: SetUp) -> None:
        """Build the shared state and tell the agent where everything lies."""
        from lockstep.worker.context import Session

        self.session = Session.build(
            self.loaded.task,
            self.loaded.model,
            self.loaded.train,
            self.loaded.held_out,
            request.plan,
            self.loaded.order_rule,
            networked=request.networked,
        )
        give_back_freed_memory()  # before forks share it
        shared = self.session.shared
        segments = [shared.segments[name] for name in ("state", "snapshot", "control", "slots")]
        message = StateReady(
            layout=shared.layout,
            slot_map=shared.slot_map(),
            segment_bytes=tuple(segment.nbytes for segment in segments),
            profile=json.dumps(self.session.profile()),
            scheduler_metric=self.session.schedule.metric,
            cuts=json.dumps(shared.cuts),
        )
        fds = [segment.fd for segment in segments]
        boards = self.session.boards
        if boards is not None and request.plan.ownership == "slices":  # an agent carries them over
            fds += boards.all_fds
        self.channel.send(message, fds)

    def fork_worker(self, worker_id: int) -> None:
        """Fork a worker."""
        assert self.session is not None
        ends: tuple[Channel, ...] = ()
        try:
            if self.session.plan.purity > 0.0:
                ends = Channel.pair()
            channel = self._fork(WorkerForked)
        except OSError as error:
            for end in ends:
                end.close()
            raise ResourceError(
                f"a worker cannot be forked: {error}",
                expected="a process, memory and file descriptors to be had",
                fix="look at ulimit -u and -n, at the limits of the cgroup and at the free memory",
            ) from error
        if channel is not None:
            for end in ends[:1]:
                end.close()
            self._be_worker(worker_id, channel, *map(to_pristine, ends[1:]))
        for own_end, worker_end in [ends] if ends else []:
            worker_end.close()
            self.computing[own_end.fileno()] = to_computing(own_end)

    def clone(self, request: CloneServer, fds: list[int]) -> bool:
        """Fork a forkserver with what this one has loaded; true in the clone."""
        channel = self._fork(ServerCloned)
        if channel is not None:
            self.channel, self.children = to_client(channel), set()
            self.computing, self.computed_by = {}, {}
            for number in (1, 2) if fds else ():
                os.dup2(fds[0], number)
            if request.environment is not None:
                os.environb.clear()
                os.environb.update(request.environment)
        for fd in fds:
            os.close(fd)
        return channel is not None

    def check_purity(self) -> None:
        """Compute a shard in two pristine forks, and compare."""
        from lockstep.worker.purity_check import PurityCheck

        assert self.session is not None
        PurityCheck(self.session, self.fork_pristine, self.channel.fileno()).run()
        self.channel.send(PurityChecked())

    def measure_job(self, request: MeasureJob) -> None:
        """Have forks compute shards and steps, and tell what these take."""
        from lockstep.worker.measuring_forks import measure_job

        self.channel.send(JobMeasured(found=measure_job(self.session, request, self._channels())))

    def compute_again(self, fd: int) -> None:
        """Fork a process that computes what a worker asks for, or let go of one that has ended."""
        from lockstep.worker.pristine import Work

        channel = self.computing[fd]
        last = self.computed_by.pop(fd, 0)
        if last in self.children:
            os.kill(last, signal.SIGKILL)  # nobody waits for it any more
        try:
            request, (outcome_fd,) = channel.receive()
        except Closed:
            del self.computing[fd]
            channel.close()
            return
        work = Work(step=request.step, shard=request.shard, told=request.told)
        try:
            pid = self.fork_pristine([work], None, outcome_fd, request.explain)
            self.children.add(pid)
            self.computed_by[fd] = pid
            pidfd = os.pidfd_open(pid)
        except OSError:  # no process can be had; the worker goes on without it
            return
        finally:
            os.close(outcome_fd)
        with contextlib.suppress(Closed):
            channel.send(ShardForked(pid=pid), [pidfd])
        os.close(pidfd)

    def fork_pristine(self, works: Sequence[Work], slot: int | None, fd: int, explain: bool) -> int:
        """Fork a process that computes shards, and leaves an outcome in a file; its process id."""
        parent = os.getpid()
        flush()
        pid = os.fork()
        if pid == 0:
            in_child(parent, self._channels())
            self._be_pristine(works, slot, fd, explain)
        return pid

    def _be_pristine(self, works: Sequence[Work], slot: int | None, fd: int, explain: bool) -> None:
        """Compute shards unseen; never returns."""
        from lockstep.worker.pristine import compute, write_outcome

        assert self.session is not None
        set_title("purity check")
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)  # a worker prints the same
            for number in (1, 2):
                os.dup2(nowhere, number)
            room = None if slot is None else self.session.shared.slots[slot]
            write_outcome(fd, compute(self.session, works, room, explain=explain))
        finally:
            os._exit(0)

    def _fork(self, answer: type[WorkerForked | ServerCloned]) -> Channel | None:
        """Fork, and tell the agent of the child; in the child, return its end of its channel.

        Raises:
            OSError: there is no process, or no file descriptor, to be had; nothing is left.
        """
        agent_end, child_end = Channel.pair()
        parent = os.getpid()
        flush()
        try:
            pid = os.fork()
            if pid == 0:
                in_child(parent, [*self._channels(), agent_end])
                return child_end
            self.children.add(pid)
            pidfd = _open_pidfd(pid)
        except OSError:
            agent_end.close()
            child_end.close()
            raise
        child_end.close()
        try:
            self.channel.send(answer(pid=pid), [agent_end.fileno(), pidfd])
        finally:
            os.close(pidfd)
            agent_end.close()
        return None

    def _channels(self) -> list[Channel]:
        """What is not for children to hold."""
        return [self.channel.channel, *(each.channel for each in self.computing.values())]

    def _be_worker(
        self, worker_id: int, channel: Channel, to_forkserver: ToPristine | None = None
    ) -> None:
        """Run a worker to its end; never returns."""
        from lockstep.worker.main import work

        assert self.session is not None
        set_title(f"worker {worker_id}")
        code = 1
        try:
            code = work(self.session, worker_id, to_agent(channel), to_forkserver)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def reap(self) -> None:
        """Collect the children that have ended, and say so."""
        while self.children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self.children.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            self.channel.send(ChildExited(pid=pid, code=code))

    def end(self) -> None:
        """Kill and reap every child. One that hangs in the kernel is left to it."""
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
        limit = time.monotonic() + END_SECONDS
        with contextlib.suppress(OSError):  # no descriptors: they end all the same
            for pid in self.children:
                pidfd = os.pidfd_open(pid)
                if ends_within(pidfd, limit - time.monotonic()):
                    os.waitpid(pid, 0)
                os.close(pidfd)


def _open_pidfd(pid: int) -> int:
    """The pidfd of a child; without one it is ended, and its end is told as any child's."""
    try:
        return os.pidfd_open(pid)
    except OSError:
        os.kill(pid, signal.SIGKILL)
        raise
