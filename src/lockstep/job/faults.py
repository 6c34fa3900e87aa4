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
"""The phases of a step in which a fault can happen."""


BETWEEN_HOSTS = ("exchange", "return")
"""More phases of a step on several hosts: before hosts exchange their partial sums, and before
they return the sums or parameters that they own."""


IN_TEAMS = ("team_forward", "team_backward", "team_slot")
"""More phases of a shard that a team computes: between two exchanges of the forward pass, before an
exchange of the backward pass, and when a member's gradients are written."""


AROUND = ("start", "join")
"""Phases outside of a step: before a worker has reported that it is ready, where this step was the
last report for its worker_id; and when it has become a member, from this step on."""


ANYWHERE = (*PHASES, *BETWEEN_HOSTS, *IN_TEAMS, *AROUND)


KINDS = ("kill", "segfault", "exit", "stop", "loop", "slow", "flip", "host")
"""SIGKILL; SIGSEGV; exit status 3; SIGSTOP; an endless loop; each shard slower from here on; a
flipped bit in the gradient (phase `slot`) or in a parameter (phase `barrier`); SIGKILL to the
host's agent, and so to all of its workers."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Fault: what happens to which worker, and when."""

    worker_id: int
    """The worker; -1: the first one that gets there."""
    step: int
    phase: str
    kind: Literal["kill", "segfault", "exit", "stop", "loop", "slow", "flip", "host"] = "kill"
    repeat: bool = False
    """Happen again to every replacement, as with a poisoned shard."""
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
"""The worker_id of a fault that happens to no worker."""


def to_message(faults: Sequence[Fault]) -> list[dict[str, Any]]:
    """The faults as JSON can hold them."""
    return [dataclasses.asdict(fault) for fault in faults]
