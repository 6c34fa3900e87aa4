"""Measuring forks: starts the forks of a job measurement, and ends them, whatever becomes of it."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Sequence

import msgspec

from lockstep.planning.forkserver_messages import MeasureJob
from lockstep.planning.job_profile import Measurement
from lockstep.system.process_title import set_title
from lockstep.system.unix_channel import Channel, Closed
from lockstep.worker.context import Session
from lockstep.worker.fork_setup import flush, in_child
from lockstep.worker.job_measurement import Board, measure, reset_words


class MeasuringForks:
    """The forks of one measurement. Used in the forkserver, while it does nothing else."""

    def __init__(
        self, session: Session, request: MeasureJob, agent: int, inherited: Sequence[Channel]
    ) -> None:
        """`agent`: a descriptor that is hung up when nobody waits any more. `inherited`: what is
        not for the forks to hold."""
        self._session, self._request = session, request
        self._agent, self._inherited = agent, list(inherited)
        self._board = Board()
        self._outcome = -1

    def run(self) -> Measurement | None:
        """Measure; None where that failed or took too long.

        Raises:
            Closed: the agent has gone.
        """
        reset_words(self._session.shared.control, self._request.workers)
        self._outcome = os.memfd_create("lockstep-measurement", os.MFD_CLOEXEC)
        pidfds: dict[int, int] = {}
        """By pidfd of a fork, its process id; the first one's is the first."""
        try:
            for rank in range(self._request.workers):
                pid = self._fork(rank)
                pidfds[os.pidfd_open(pid)] = pid
            self._await_end(list(pidfds))
            return self._found()
        except OSError:
            return None  # no process, or no descriptor, can be had
        finally:
            for pidfd, pid in pidfds.items():
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                os.waitpid(pid, 0)
                os.close(pidfd)
            os.close(self._outcome)

    def _found(self) -> Measurement | None:
        size = os.fstat(self._outcome).st_size
        if not size:
            return None
        return msgspec.msgpack.decode(os.pread(self._outcome, size, 0), type=Measurement)

    def _await_end(self, pidfds: Sequence[int]) -> None:
        """Return when the first fork has ended, or another one before it, or the time is over."""
        poll, limit = select.poll(), time.monotonic() + self._request.limit
        for pidfd in pidfds:
            poll.register(pidfd, select.POLLIN)
        poll.register(self._agent, 0)
        while (left := limit - time.monotonic()) > 0:
            ready = {fd for fd, _ in poll.poll(left * 1000)}
            if self._agent in ready:
                raise Closed
            for fd in ready:
                ended = os.waitid(os.P_PIDFD, fd, os.WEXITED | os.WNOWAIT)
                if fd == pidfds[0] or ended is None or ended.si_status:
                    return  # it is done, or one of the others has failed
                poll.unregister(fd)

    def _fork(self, rank: int) -> int:
        """Fork one; its process id."""
        parent = os.getpid()
        flush()
        pid = os.fork()
        if pid == 0:
            in_child(parent, self._inherited)
            self._measure(rank)
        return pid

    def _measure(self, rank: int) -> None:
        """Be one of the forks; never returns."""
        set_title("measuring")
        request, code = self._request, 1
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)  # a worker prints the same
            for number in (1, 2):
                os.dup2(nowhere, number)
            found = measure(
                self._session, rank, request.workers, request.sizes, request.budget, self._board
            )
            if found is not None:
                os.pwrite(self._outcome, msgspec.msgpack.encode(found), 0)
            code = 0
        finally:
            os._exit(code)


def measure_job(
    session: Session | None, request: MeasureJob, inherited: Sequence[Channel]
) -> Measurement | None:
    """Measure once; see `MeasuringForks`. The first channel is the one to the agent."""
    assert session is not None
    return MeasuringForks(session, request, inherited[0].fileno(), inherited).run()
