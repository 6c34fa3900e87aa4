"""Launcher: what brings agents to hosts (a protocol)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from lockstep.agent.job_offer import JobOffer

if TYPE_CHECKING:
    from lockstep.net.identity import Identity
    from lockstep.net.transport import Report


class Launcher(Protocol):
    """Brings agents to hosts. The master uses it as a context manager.

    Whatever starts machines (`up` and `join`, Ray, torchrun, SLURM) is one of these to the master;
    agents then connect to the offer's address by themselves.
    """

    identity: Identity
    """The master's own."""
    host: str
    """The address on which the master listens."""
    workers: int | None
    """How many workers the master's own host would run; None: as its cores allow."""
    report: Report
    """Told of a host whose agent cannot take part, and why. The master puts its own here."""

    def offer(self, offer: JobOffer) -> tuple[str, ...]:
        """Start an agent for this job on every host, and on each that is added until `close`.

        Returns the names of the hosts that there are now, without the master's own.
        """

    def close(self) -> None:
        """Offer the job to nobody any more. Agents end by themselves when their master does."""
