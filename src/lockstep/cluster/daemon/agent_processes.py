"""Agent processes: one for each job of a host, which ends with the process that started it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lockstep.agent.job_offer import JobOffer
from lockstep.errors import LockstepError, ProtocolError, WorkerLostError
from lockstep.system.messages import Codec, ErrorMessage, Label, Message, encode

END_SECONDS = 5.0
"""How long an agent may take to end by itself."""
MAX_ERROR = 64 << 10
"""Bytes: what fits into a pipe that nobody reads."""
MOVED = b"moved\n"
"""What an agent says first, once it has taken part in a step."""


class AgentOrder(Message):
    """What an agent is to do, and for whom."""

    parent: int
    """The process id of whoever starts it, and with which it ends."""
    identity: bytes
    """The path of the folder that says who this host is."""
    workers: int
    host: Label
    """The address that other hosts reach this one at."""
    folder: bytes
    """The path of a folder for code that the master sends; empty: none is taken."""
    offer: JobOffer
    functions: bool
    """Whether the task's name may lead to a function."""
    discreet: bool
    """Whether errors that go to the master say nothing of files."""


ORDER: Codec[AgentOrder] = Codec(AgentOrder)
ERROR: Codec[ErrorMessage] = Codec(ErrorMessage)


@dataclass(frozen=True)
class Ended:
    """An agent is gone, and has been waited for."""

    job: str
    error: LockstepError | None
    """Why, if not because the job has ended."""
    moved: bool
    """Whether it had taken part in a step."""


class Agents:
    """Starts and ends agents; to be used by one thread, which has to outlive them.

    (The kernel ends an agent when the thread that started it ends.)
    """

    def __init__(self, put: Callable[[Ended], None]) -> None:
        self._put = put
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._watching: dict[str, threading.Thread] = {}

    @property
    def jobs(self) -> tuple[str, ...]:
        """The jobs that have an agent which has not been `reap`ed."""
        return tuple(self._children)

    def pid(self, job: str) -> int:
        """The process id of a job's agent."""
        return self._children[job].pid

    def start(
        self,
        offer: JobOffer,
        *,
        identity: str,
        workers: int,
        host: str,
        folder: Path | None,
        functions: bool = True,
        discreet: bool = False,
    ) -> None:
        """Start an agent. It takes the place of the one of the same job, which must have ended.

        `folder` is for code that the master sends; `functions`: whether the task's name may lead
        to a function; `discreet`: whether errors that go to the master say nothing of files.
        """
        child = subprocess.Popen(
            [sys.executable, "-m", "lockstep.cluster.daemon.agent_main"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is for us to pass on
        )
        order = AgentOrder(
            parent=os.getpid(),
            identity=os.fsencode(identity),
            workers=workers,
            host=host,
            folder=b"" if folder is None else os.fsencode(folder),
            offer=offer,
            functions=functions,
            discreet=discreet,
        )
        self._children[offer.job] = child
        thread = threading.Thread(
            target=self._watch, args=(offer.job, child, order), name="lockstep agent", daemon=True
        )
        self._watching[offer.job] = thread
        thread.start()

    def end(self, job: str, *, at_once: bool = False) -> None:
        """Have an agent end: by itself, or at once. `Ended` tells when it has."""
        child = self._children[job]
        if at_once:
            child.kill()
        else:
            child.terminate()

    def reap(self, job: str) -> None:
        """Forget an agent that has ended."""
        self._watching.pop(job).join()
        del self._children[job]

    def close(self) -> None:
        """End all agents, and wait for them."""
        for child in self._children.values():
            child.terminate()
        for child in self._children.values():
            try:
                child.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
        for job in self.jobs:
            self.reap(job)

    def _watch(self, job: str, child: subprocess.Popen[bytes], order: AgentOrder) -> None:
        """Give an agent its order, and wait for its end."""
        assert child.stdin is not None and child.stdout is not None
        with contextlib.suppress(OSError):
            child.stdin.write(encode(order))
        with contextlib.suppress(OSError):
            child.stdin.close()
        code = child.wait()
        with child.stdout as stdout:
            # Nobody is waited for who may have inherited the pipe.
            os.set_blocking(stdout.fileno(), False)
            said = stdout.read(MAX_ERROR) or b""
        self._put(Ended(job, why(code, said.removeprefix(MOVED)), said.startswith(MOVED)))


def why(code: int, said: bytes) -> LockstepError | None:
    """The error with which an agent has ended, by its exit code and what it has said of it."""
    if code == 0:
        return None
    with contextlib.suppress(ProtocolError):
        return ERROR.decode(said).error()
    found = f"signal {-code}" if code < 0 else f"exit code {code}"
    return WorkerLostError(
        "an agent died", expected="that it ends with its job", found=found, fix="see its stderr"
    )
