"""Local host: the processes of one host, its forkserver and its workers."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.agent.forkserver_client import (
    FORK_SECONDS,
    LOAD_SECONDS,
    ForkServerClient,
    describe_exit,
)
from lockstep.agent.preload import environment_for, new_forkserver
from lockstep.job.task_source import TaskSource
from lockstep.planning.forkserver_messages import (
    CheckPurity,
    ForkWorker,
    JobMeasured,
    LoadTask,
    MeasureJob,
    PurityChecked,
    SetUp,
    StateReady,
    TaskLoaded,
    WorkerForked,
)
from lockstep.planning.job_profile import Measurement
from lockstep.planning.plan import Plan
from lockstep.planning.worker_messages import ToWorker, WorkerMessage, to_worker
from lockstep.state.host_memory import HostMemory
from lockstep.system.folders import working_folder
from lockstep.system.processes import ends_within
from lockstep.system.shared_memory import Segment
from lockstep.system.unix_channel import Channel, Closed

STACK_SECONDS = 0.5
HANG_SECONDS = 5.0
"""After how long a killed worker that has not ended counts as dead."""
KILL_SECONDS = 10.0
"""How long killed workers may take to end."""


@dataclass
class WorkerHandle:
    """A worker process and the two descriptors that stand for it."""

    worker_id: int
    pid: int
    channel: ToWorker
    pidfd: int
    alive: bool = True
    killed_at: float | None = None
    """When it was first killed, if it was."""
    stack_fd: int = -1
    """Where the worker writes its Python stack when it is asked to."""

    def kill(self) -> None:
        """Kill the process; its end shows on the pidfd."""
        if self.killed_at is None:
            self.killed_at = time.monotonic()
        self._send(signal.SIGKILL)

    @property
    def hangs(self) -> bool:
        """Whether it was killed long ago, and the kernel has not ended it.

        It is as good as dead: with SIGKILL pending no thread of it returns to its own code, but the
        kernel may hold it for as long as a disk or a network file system does not answer.
        """
        killed = self.killed_at
        return self.alive and killed is not None and time.monotonic() - killed > HANG_SECONDS

    def _send(self, number: signal.Signals) -> None:
        """Send a signal to the process, which may have ended without our having heard of it."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    def process_state(self) -> str:
        """What the kernel says of the process: running, sleeping, stopped."""
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except OSError:
            return "gone"
        return next(line for line in status.splitlines() if line.startswith("State")).split("\t")[1]

    def is_stopped(self) -> bool:
        """Whether a signal has stopped the process."""
        return self.process_state().startswith("T")

    def python_stack(self) -> str:
        """The worker's Python stack, if it still answers signals."""
        if self.stack_fd < 0 or self.is_stopped():
            return ""
        limit = time.monotonic() + STACK_SECONDS
        self._send(signal.SIGUSR1)
        while os.fstat(self.stack_fd).st_size == 0 and time.monotonic() < limit:
            select.select([], [], [], 0.005)
        return os.pread(self.stack_fd, 16384, 0).decode(errors="replace")

    def close(self) -> None:
        self.channel.close()
        os.close(self.pidfd)
        if self.stack_fd >= 0:
            os.close(self.stack_fd)


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that a worker said (`message`), or its death (`message` is None)."""

    worker: WorkerHandle
    message: WorkerMessage | None


def _argv(source: TaskSource) -> list[str]:
    """The command line for the task's code: the script's own, or of a named task its file alone.

    Code that parses it when it is imported finds what it found in the script, or its defaults.
    """
    if source.payload is not None:
        return sys.argv
    return [source.name.rpartition(":")[0] or source.name]


def _search_path(here: str, shipped: str) -> list[str]:
    """Where a forkserver that works `here` looks for modules; first in the folder of code that was
    sent, if any was."""
    path = [entry or here for entry in sys.path]
    return [shipped, here, *path] if shipped else path


class LocalHost:
    """Starts and ends the processes of one host. Use it as a context manager."""

    def __init__(self, forkserver: ForkServerClient, name: str) -> None:
        self._forkserver, self.name = forkserver, name
        self.workers: dict[int, WorkerHandle] = {}
        self.facts: dict[str, Any] = {}
        self.data: Segment | None = None
        """The data sets, if they are to be sent to other hosts."""
        self._memory: HostMemory | None = None
        self.also_wake: int | None = None
        """A descriptor at which `events` returns, too, when it is readable."""

    @classmethod
    def start(
        cls,
        source: TaskSource,
        settings: dict[str, Any],
        records: Mapping[str, Any] | None = None,
        *,
        networked: bool = False,
        data: Segment | None = None,
        name: str = "",
    ) -> LocalHost:
        """Start a forkserver and have it load the task.

        `records` says which file takes the place of its data: `{"path", "keep"}`. `networked`: the
        facts are to be compared with other hosts'. `data`: what the master has sent, the data sets
        or that file. `name`: the host's, by default the machine's.

        Raises:
            JobError: the folder that this process works in is gone.
        """
        here = working_folder()
        forkserver = new_forkserver(environment_for(settings.get("numerics", "native")))
        fds = []
        if source.payload is not None:
            fds.append(os.memfd_create("lockstep-task", os.MFD_CLOEXEC))
            with open(fds[0], "wb", closefd=False) as file:
                file.write(source.payload)
        request = LoadTask(
            name=os.fsencode(source.name),
            args=json.dumps(dict(source.args)),
            code=source.code,
            code_folder=os.fsencode(source.folder),
            offered=source.offered,
            functions=source.functions,
            has_payload=source.payload is not None,
            settings=json.dumps(settings),
            records=json.dumps(None if records is None else dict(records)),
            data_bytes=0 if data is None else data.nbytes,
            networked=networked,
            folder=os.fsencode(here),
            search_path=tuple(map(os.fsencode, _search_path(here, source.folder))),
            argv=tuple(map(os.fsencode, _argv(source))),
        )
        try:
            forkserver.channel.send(request, fds if data is None else [*fds, data.fd])
        finally:
            for fd in fds:
                os.close(fd)
        return cls(forkserver, name or platform.node() or "localhost")

    def __enter__(self) -> LocalHost:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def loaded(self) -> dict[str, Any]:
        """Wait until the task is built; the facts about it."""
        message, fds = self._forkserver.expect(TaskLoaded, LOAD_SECONDS)
        self.facts = json.loads(message.facts)
        if fds:
            self.data = Segment(fds[0], message.data_bytes)
        return self.facts

    def clone(self) -> LocalHost:
        """A second host with the same task, for a trial."""
        clone = LocalHost(self._forkserver.clone(), self.name)
        clone.facts = self.facts
        return clone

    def set_up(self, plan: Plan, *, networked: bool = False) -> HostMemory:
        """Allocate shared memory for the plan. It is closed with the host.

        `networked`: other hosts may take part.
        """
        request = SetUp(plan=plan, networked=networked)
        ready, fds = self._forkserver.ask(request, StateReady, LOAD_SECONDS)
        self._memory = HostMemory.of(plan, ready, fds)
        return self._memory

    def check_purity(self) -> None:
        """Check, before the first step, that what a shard gives depends on nothing that its process
        has computed before.

        Raises:
            TaskError: it does.
        """
        self._forkserver.ask(CheckPurity(), PurityChecked, LOAD_SECONDS)

    def measure_job(
        self, workers: int, sizes: Sequence[int], *, budget: float, limit: float
    ) -> Measurement | None:
        """What shards of these sizes, the job's own first, and steps take while so many workers
        compute; for a clone that is set up. None: it failed, or took longer than `limit` seconds.
        """
        request = MeasureJob(workers=workers, sizes=tuple(sizes), budget=budget, limit=limit)
        return self._forkserver.ask(request, JobMeasured, LOAD_SECONDS)[0].found

    def spawn(self, worker_id: int) -> WorkerHandle:
        """Fork a worker."""
        forked, (channel_fd, pidfd) = self._forkserver.ask(
            ForkWorker(worker_id=worker_id), WorkerForked, FORK_SECONDS
        )
        worker = WorkerHandle(
            worker_id=worker_id,
            pid=forked.pid,
            channel=to_worker(Channel.from_fd(channel_fd)),
            pidfd=pidfd,
        )
        if worker_id in self.workers:
            self.workers[worker_id].close()
        self.workers[worker_id] = worker
        return worker

    def events(self, timeout: float) -> Iterator[Event]:
        """What the workers have said, and who has died; waits up to `timeout` seconds for it.

        A worker's last words come before its death.

        Raises:
            WorkerLostError: the forkserver has died.
        """
        poll = select.poll()
        channels: dict[int, WorkerHandle] = {}
        deaths: dict[int, WorkerHandle] = {}
        for worker in self.workers.values():
            if worker.alive:
                poll.register(worker.channel, select.POLLIN)
                poll.register(worker.pidfd, select.POLLIN)
                channels[worker.channel.fileno()] = worker
                deaths[worker.pidfd] = worker
        poll.register(self._forkserver.channel, select.POLLIN)
        if self.also_wake is not None:
            poll.register(self.also_wake, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(timeout * 1000)}
        for fd in ready & channels.keys():
            yield from self._heard(channels[fd])
        if self._forkserver.channel.fileno() in ready:
            self._forkserver.hear()
        for fd in ready & deaths.keys():
            worker = deaths[fd]
            yield from self._heard(worker)
            worker.alive = False
            yield Event(worker=worker, message=None)
        for worker in list(self.workers.values()):
            if worker.hangs:
                worker.alive = False
                yield Event(worker=worker, message=None)

    def _heard(self, worker: WorkerHandle) -> Iterator[Event]:
        try:
            while worker.channel.ready():
                message, fds = worker.channel.receive()
                if fds:
                    worker.stack_fd = fds[0]
                yield Event(worker=worker, message=message)
        except Closed:
            return

    def kill_workers(self) -> bool:
        """Kill every worker; whether all of them have ended."""
        deadline = time.monotonic() + KILL_SECONDS
        for worker in self.workers.values():
            worker.kill()
        for worker in self.workers.values():
            if worker.alive:
                worker.alive = not ends_within(worker.pidfd, deadline - time.monotonic())
        return not any(worker.alive for worker in self.workers.values())

    def how_it_ended(self, worker: WorkerHandle) -> str:
        """Why a dead worker died, in words."""
        if not ends_within(worker.pidfd, 0.0):
            return f"was killed, and hangs in the kernel ({worker.process_state()})"
        code = self._forkserver.exit_code(worker.pid, 1.0)
        return "ended" if code is None else describe_exit(code)

    def close(self) -> None:
        """End every process and let go of the shared memory."""
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()
        self._forkserver.close()
        if self.data is not None:
            self.data.close()
        if self._memory is not None:
            self._memory.close()
            self._memory = None
