"""Restart policy: whether a job gets another agent on a host where one has died. Pure.

    decide(run, event) -> (run, reason)

`lockstep join` is the I/O of it. Only a death is followed by another agent: one that was refused,
whose job failed, or that has done its part would fare no better a second time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lockstep.cluster.daemon.reconnecting_line import pause
from lockstep.errors import LockstepError, PeerClosedError, PeerTimeoutError, WorkerLostError

MOST_DEATHS = 5
"""How many agents may die, one after the other, without a step in which one took part."""


@dataclass(frozen=True, kw_only=True)
class AgentRun:
    """The agents of one job on one host, one after the other."""

    offered: bool = True
    """Whether the job is still offered."""
    deaths: int = 0
    """How many agents have died since one took part in a step."""
    wait: float | None = 0.0
    """Seconds until an agent is started, unless one runs; None: no more of them."""


# Events.


@dataclass(frozen=True)
class Offered:
    """The job is offered again, since `up` has come back."""


@dataclass(frozen=True)
class Withdrawn:
    """The job is not offered any more."""


@dataclass(frozen=True)
class Died:
    """The agent has ended with an error, or without a word."""

    error: LockstepError
    moved: bool
    """Whether it had taken part in a step."""


@dataclass(frozen=True)
class Done:
    """The agent has ended since its job has."""


Event = Offered | Withdrawn | Died | Done


def is_death(error: LockstepError | None) -> bool:
    """Whether an agent has been killed, has crashed, or has lost its master."""
    return isinstance(error, WorkerLostError | PeerClosedError | PeerTimeoutError)


def decide(run: AgentRun, event: Event) -> tuple[AgentRun, str]:
    """The next state, and what follows, in words."""
    match event:
        case Offered():
            return replace(run, offered=True), "the job is offered again"
        case Withdrawn():
            return replace(run, offered=False), "the job is not offered any more"
        case Done():
            return replace(run, wait=None), "its job has ended"
        case Died(error, moved):
            deaths = 1 if moved else run.deaths + 1
            run = replace(run, deaths=deaths, wait=None)
            if not run.offered:
                return run, "it is not started again: the job is not offered any more"
            if not is_death(error):
                return run, "it is not started again"
            if deaths >= MOST_DEATHS:
                return run, (
                    f"it is not started again: {MOST_DEATHS} have died without a step in between"
                )
            wait = pause(deaths)
            return replace(run, wait=wait), (
                f"another one is started in {wait:g} s: {deaths} of at most {MOST_DEATHS} have "
                "died without a step in between"
            )
