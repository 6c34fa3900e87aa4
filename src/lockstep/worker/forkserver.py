"""The nursery: the process that holds torch, the task and its data, and forks workers from them.

A fork starts in milliseconds with everything loaded and shared memory mapped, so a dead worker is
replaced at once. The nursery itself computes nothing and starts no thread: forking stays safe.

It serves one agent over a channel:

    preload  torch, and no task             -> preloaded
    load     the task                       -> loaded    facts for the plan
    clone    a nursery with what this has   -> cloned    with its channel and pidfd
    setup    the segments, by the plan      -> ready     with the layout and the descriptors
    spawn    a worker into a seat           -> spawned   with its channel and pidfd
             (a child has ended)            -> exited

and ends, with all its workers, when the agent's end of the channel closes.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import importlib
import os
import select
import signal
import sys
import traceback
from typing import TYPE_CHECKING

from lockstep.job.task_source import TaskSource
from lockstep.system import numerics
from lockstep.system.processes import die_with_parent, own_file_positions
from lockstep.system.unix_channel import Channel, Closed, Message
from lockstep.worker.error_report import describe_error

if TYPE_CHECKING:
    from lockstep.worker.load_task import Loaded
    from lockstep.worker.main import Session

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


class Cloned(BaseException):
    """Leaves the loop of the process that was forked: this one serves another agent."""


class ForkServer:
    """The state of the process, and one method per request."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.children: dict[int, int] = {}
        """Process id to seat; -1 for a clone."""
        self.loaded: Loaded
        """By `load`."""
        self.session: Session | None = None

    def preload(self, request: Message, _: list[int]) -> None:
        """Import what every run needs."""
        import_needed()
        numerics.configure(threads=1)
        self.channel.send({"event": "preloaded"})

    def load(self, request: Message, fds: list[int]) -> None:
        """Import torch, build the task, its model and its data sets."""
        os.chdir(request["folder"])
        sys.path[:] = request["path"]
        sent = fds.pop() if request["data"] else -1
        payload = None
        if fds:
            with open(fds[0], "rb") as file:
                file.seek(0)
                payload = file.read()
        import_needed()
        numerics.configure(threads=1)
        numerics.keep_to_one_thread()
        from lockstep.data.dataset_shipping import write_sets
        from lockstep.worker.load_task import load

        source = TaskSource(
            name=request["name"],
            args=request["args"],
            payload=payload,
            code=request["code"],
            folder=request["shipped"],
            offered=request["offered"],
        )
        self.loaded = load(source, request, sent)
        message = {"event": "loaded", "facts": self.loaded.facts}
        if self.loaded.ships:
            sets = write_sets(self.loaded.train, self.loaded.held_out)
            with contextlib.closing(sets):
                self.channel.send({**message, "data": sets.nbytes}, [sets.fd])
        else:
            self.channel.send(message)

    def setup(self, request: Message, _: list[int]) -> None:
        """Build the shared state and tell the agent where everything lies."""
        from lockstep.worker.main import Session

        self.session = Session.build(
            self.loaded.task,
            self.loaded.model,
            self.loaded.train,
            self.loaded.held_out,
            request["plan"],
            networked=request["networked"],
        )
        shared = self.session.shared
        names = ("state", "base", "control", "slots")
        message = {
            "event": "ready",
            "layout": shared.layout.to_message(),
            "control": dataclasses.asdict(shared.control.shape),
            "slots": shared.slot_map().to_message(),
            "nbytes": [shared.segments[name].nbytes for name in names],
            "profile": numerics.profile(request["plan"]["numerics"], request["plan"]["threads"]),
        }
        self.channel.send(message, [shared.segments[name].fd for name in names])

    def spawn(self, request: Message, _: list[int]) -> None:
        """Fork a worker."""
        assert self.session is not None
        channel = self._fork(request["seat"], {"event": "spawned", "seat": request["seat"]})
        if channel is not None:
            self._be_worker(request["seat"], channel)

    def clone(self, request: Message, fds: list[int]) -> None:
        """Fork a nursery with what this one has loaded, and with the given stderr, if any."""
        channel = self._fork(-1, {"event": "cloned"})
        if channel is not None:
            self.channel, self.children = channel, {}
            for number in (1, 2) if fds else ():
                os.dup2(fds[0], number)
            if "environment" in request:
                os.environ.clear()
                os.environ.update(request["environment"])
        for fd in fds:
            os.close(fd)
        if channel is not None:
            raise Cloned

    def _fork(self, worker_id: int, answer: Message) -> Channel | None:
        """Fork, and tell the agent of the child; in the child, return its end of its channel."""
        ours, theirs = Channel.pair()
        parent = os.getpid()
        _flush()
        pid = os.fork()
        if pid == 0:
            _in_child(parent, [self.channel, ours])
            return theirs
        theirs.close()
        self.children[pid] = worker_id
        pidfd = os.pidfd_open(pid)
        try:
            self.channel.send({**answer, "pid": pid}, [ours.fileno(), pidfd])
        finally:
            os.close(pidfd)
            ours.close()
        return None

    def _be_worker(self, worker_id: int, channel: Channel) -> None:
        """Run a worker to its end; never returns."""
        from lockstep.worker.main import work

        assert self.session is not None
        code = 1
        try:
            code = work(self.session, worker_id, channel)
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
            worker_id = self.children.pop(pid, -1)
            code = os.waitstatus_to_exitcode(status)
            self.channel.send({"event": "exited", "seat": worker_id, "pid": pid, "code": code})

    def end(self) -> None:
        """Kill and reap every child."""
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
        for pid in self.children:
            os.waitpid(pid, 0)


def _flush() -> None:
    """Write what is buffered, so that a fork does not write it again."""
    sys.stdout.flush()
    sys.stderr.flush()


def _in_child(parent: int, inherited: list[Channel]) -> None:
    """Make a forked child independent of the nursery's own business."""
    die_with_parent(parent)
    _take_signals()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for channel in inherited:
        channel.close()
    own_file_positions()


def _leave_to_master(number: int, frame: object) -> None:
    pass


def _take_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _leave_to_master)


def _restore_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == _leave_to_master:
            signal.signal(number, signal.SIG_DFL)


def serve(forkserver: ForkServer) -> bool:
    """Answer requests until the agent closes the channel; true in a clone, that is to go on."""
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    poll = select.poll()
    poll.register(forkserver.channel, select.POLLIN)
    poll.register(wake_read, select.POLLIN)
    try:
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if wake_read in ready:
                os.read(wake_read, 4096)
                forkserver.reap()
            if forkserver.channel.fileno() in ready:
                request, fds = forkserver.channel.receive()
                _answer(forkserver, request, fds)
    except Closed:
        forkserver.end()
        return False
    except Cloned:
        return True
    finally:
        os.close(wake_read)
        os.close(wake_write)


def _answer(forkserver: ForkServer, request: Message, fds: list[int]) -> None:
    handlers = {
        "preload": forkserver.preload, "load": forkserver.load, "setup": forkserver.setup,
        "spawn": forkserver.spawn, "clone": forkserver.clone,
    }  # fmt: skip
    try:
        handlers[request["op"]](request, fds)
    except Closed:
        raise
    except (Exception, SystemExit) as error:  # a file may call sys.exit() when it is imported
        doing = {"load": "loading", "setup": "being set up"}.get(str(request["op"]), "at work")
        forkserver.channel.send({"event": "failed", "error": describe_error(error, doing)})


def _end_at_once(forkserver: int) -> None:
    """End without clearing torch's modules away one by one: half a second, and the master waits."""
    if os.getpid() == forkserver:
        _flush()
        os._exit(0)


def main() -> None:
    """Entry point of the process: `python -m lockstep.worker.forkserver FD PARENT`."""
    fd, parent = int(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the master decides what Ctrl-C means
    # Nor do SIGTERM and SIGHUP end anything here: they may have gone to all processes of a job at
    # once, and the master, which has them too, stops with a checkpoint. What the task itself starts
    # can be terminated as ever: a handler does not outlive an exec, and a fork puts the default
    # back.
    _take_signals()
    os.register_at_fork(after_in_child=_restore_signals)
    os.dup2(2, 1)  # what the user's code prints is not the run's output
    forkserver = ForkServer(Channel.from_fd(fd))
    try:
        while True:
            # Comes after what the task registers later; in a clone, in place of what it had before.
            atexit.register(_end_at_once, os.getpid())
            if not serve(forkserver):
                break
    except BaseException:
        atexit.unregister(_end_at_once)  # it would hide the exit code
        raise


if __name__ == "__main__":
    main()
