"""Host group: the hosts of a running job, as the coordinator sees them (a contract).

There are two: `SingleHostGroup` has one host and nothing to do, `NetworkHostGroup` has several.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from lockstep.agent.evaluation_rounds import EvaluationShare
from lockstep.planning.metric_decisions import Told


class StateParts(Protocol):
    """The parts of the state that single hosts alone have, where none has the whole of it."""

    def due(self) -> bool:
        """Whether all shall rest soon, for the snapshot to be made whole."""

    def collect(self) -> bool:
        """Make the snapshot whole, while all rest. False: a host is lost, so it could not be."""


class HostGroup(Protocol):
    """Leads hosts through a job. All calls come from the coordinator's thread."""

    @property
    def share(self) -> EvaluationShare:
        """How held-out batches are divided among the hosts."""

    @property
    def parts(self) -> StateParts:
        """The parts of the state that single hosts alone have."""

    def stop_wanted(self, wanted: Callable[[], bool]) -> None:
        """From now on `wanted` says whether the run is to stop, so that nobody is waited for as
        long as ever. It is asked while others are waited for."""

    def begin(self) -> None:
        """The worker group of the master's own host has started: let all hosts begin."""

    def look(self) -> None:
        """See what hosts have said and who is lost, and regroup them where that is needed."""

    def lease(self, step: int) -> None:
        """Let all hosts run every step before this one."""

    def tell_metric(self, told: Told) -> None:
        """Tell the other hosts what the task's schedule waits for, while all rest."""

    def let_in(self) -> None:
        """Let the hosts that wait take part from here on."""

    def end(self) -> None:
        """The run is over: let the other hosts go."""
