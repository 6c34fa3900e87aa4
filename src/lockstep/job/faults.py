"""Fault: a scripted fault, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lockstep.errors import JobError

PHASES = (
    "load", "forward", "backward", "slot", "barrier", "reduce", "update_begin", "update_end",
    "update_done", "commit", "audit", "evaluate",
)  # fmt: skip
"""Where in a step a fault can strike."""


BETWEEN_HOSTS = ("exchange", "return")
"""Where else in a step on several hosts: before they give each other their sums, and, where
each sums or updates a share for all, what has become of it."""


AROUND = ("start", "join")
"""Where else: before a worker has said that it is there, in a seat whose last word was this step's;
and when it has been told that it is a member, from this step on."""


ANYWHERE = (*PHASES, *BETWEEN_HOSTS, *AROUND)


KINDS = ("kill", "segfault", "exit", "stop", "loop", "slow", "flip", "host")
"""SIGKILL; SIGSEGV; exit status 3; SIGSTOP; an endless loop; each shard slower from here on; a
flipped bit in the gradient (phase `slot`) or in a parameter (phase `barrier`); SIGKILL to the
process that leads the host's workers, and so to all of its host."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault: what happens to which worker, when."""

    worker_id: int
    """The worker's seat; -1: whoever gets there first."""
    step: int
    phase: str
    kind: Literal["kill", "segfault", "exit", "stop", "loop", "slow", "flip", "host"] = "kill"
    repeat: bool = False
    """Strike again at every replacement: a poisoned shard."""
    shard: int | None = None
    """Only while on this shard."""
    host: str | None = None
    """Only on the host of this name."""

    def __post_init__(self) -> None:
        if self.phase not in ANYWHERE or self.kind not in KINDS:
            raise JobError(
                f"there is no fault {self.kind!r} in phase {self.phase!r}",
                expected=f"one of {', '.join(KINDS)} in one of {', '.join(ANYWHERE)}",
            )


MAX_FAULTS = 64


NOBODY = -2
"""The seat of a fault that strikes nobody."""


def to_message(faults: Sequence[Fault]) -> list[dict[str, Any]]:
    """JSON-ready."""
    return [dataclasses.asdict(fault) for fault in faults]
