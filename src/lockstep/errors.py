"""Every error that Lockstep raises, in one tree.

    LockstepError
    ├── JobError             the job, its settings or its file are wrong; nothing was started
    ├── TaskError            the user's code raised, or returned something unusable
    │   ├── NonFiniteError   a loss was NaN or infinite; the step was not committed
    │   └── PoisonError      a shard killed every worker that it was given to
    ├── DataError            the data set is missing, empty or too short
    ├── OptimizerError       the optimizer cannot be run by owners of blocks
    ├── RunFolderError       the run folder exists, or is missing or unreadable
    ├── IntegrityError       bytes differ from their digest: a ledger, a checkpoint or a replay
    ├── ResourceError        not enough memory, file descriptors or disk
    ├── NumericsError        a worker does not compute the same bits as the job's profile
    ├── WorkerLostError      workers cannot be kept alive, or their forkserver died
    ├── NetworkError         hosts cannot talk to each other
    │   ├── PeerClosedError  a host has closed its connections, or has died
    │   ├── DataLostError    a host is lost, and with it a part of the data that nobody else has
    │   ├── PeerTimeoutError a host did not do in time what was waited for
    │   ├── ProtocolError    a host sent what the protocol does not allow
    │   ├── RefusedError     a host, its certificate or its join token was refused
    │   └── IdentityError    a key, a certificate or a join token cannot be used here
    └── StoppedError         somebody asked the run to stop; it can be resumed

`RunInterrupted` is not in it: as such Ctrl-C reaches a script, and `except Exception` lets it pass.

A message says what happened, what was expected, what was found and what to do next.
The command line prints it and exits with `exit_code`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class LockstepError(Exception):
    """Base of all errors raised by Lockstep."""

    exit_code = 1

    def __init__(self, what: str, *, expected: str = "", found: str = "", fix: str = "") -> None:
        self.what, self.expected, self.found, self.fix = what, expected, found, fix
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [self.what]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.found:
            lines.append(f"  found:    {self.found}")
        if self.fix:
            lines.append(f"  next:     {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (type(self), self.what, self.expected, self.found, self.fix))


def _rebuild(
    kind: type[LockstepError], what: str, expected: str, found: str, fix: str
) -> LockstepError:
    return kind(what, expected=expected, found=found, fix=fix)


class JobError(LockstepError):
    """The job, one of its settings or its file is wrong; nothing was started."""

    exit_code = 2


class TaskError(LockstepError):
    """The user's code raised, or returned something that cannot be used."""


class NonFiniteError(TaskError):
    """A loss was NaN or infinite; the step was not committed."""


class PoisonError(TaskError):
    """A shard killed every worker that it was given to."""


class DataError(LockstepError):
    """The data set is missing, empty or too short."""


class OptimizerError(LockstepError):
    """The optimizer cannot be run by owners of blocks."""


class RunFolderError(LockstepError):
    """The run folder exists, is missing, or is not readable as one."""

    exit_code = 2


class IntegrityError(LockstepError):
    """Bytes differ from their digest."""


class ResourceError(LockstepError):
    """Not enough memory, file descriptors or disk."""


class NumericsError(LockstepError):
    """A worker does not compute the same bits as the job's numerics profile."""


class WorkerLostError(LockstepError):
    """Workers cannot be kept alive, or their forkserver died or fell silent."""


class NetworkError(LockstepError):
    """Hosts cannot talk to each other."""

    def awaiting(self, what: str) -> NetworkError:
        """The same error for another thing that was waited for."""
        return type(self)(self.what, expected=what, found=self.found, fix=self.fix)


class PeerClosedError(NetworkError):
    """A host has closed its connections, or has died."""


class DataLostError(NetworkError):
    """A host is lost, and with it a part of the data that nobody else has."""


class PeerTimeoutError(NetworkError):
    """A host did not do in time what was waited for: it is stopped, cut off or too slow."""


class ProtocolError(NetworkError):
    """A host sent what the protocol does not allow; the connection is closed."""


class RefusedError(NetworkError):
    """A host, its certificate or its join token was refused."""


class IdentityError(NetworkError):
    """A key, a certificate or a join token is missing, or cannot be used here."""


class StoppedError(LockstepError):
    """Somebody asked the run to stop; its last checkpoint is that of the last step."""

    exit_code = 130


class RunInterrupted(KeyboardInterrupt):
    """A signal has stopped the run, at a step's end and with a checkpoint.

    A `KeyboardInterrupt`, so that a loop which catches the errors of single runs ends with it.
    """

    def __init__(self, stopped: StoppedError) -> None:
        super().__init__(str(stopped))
        self.stopped = stopped
        """The same as an error."""


@contextlib.contextmanager
def disk_errors(what: str, then: str = "resume the run") -> Iterator[None]:
    """Turn an error of the disk into a `ResourceError` that names what was to be written.

    `then`: what is to be done when there is space again.
    """
    try:
        yield
    except OSError as error:
        short = "Too many open files" in str(error)
        remedy = "allow more open files, with ulimit -n" if short else "free disk space"
        raise ResourceError(
            f"{what} cannot be written: {error}", fix=f"{remedy}, then {then}"
        ) from error


KINDS: dict[str, type[LockstepError]] = {
    kind.__name__: kind
    for kind in (
        LockstepError, JobError, TaskError, NonFiniteError, PoisonError, DataError,
        OptimizerError, StoppedError,
        RunFolderError, IntegrityError, ResourceError, NumericsError, WorkerLostError,
        NetworkError, PeerClosedError, DataLostError, PeerTimeoutError, ProtocolError, RefusedError,
        IdentityError,
    )
}  # fmt: skip
