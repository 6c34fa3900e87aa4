"""Host inbox: what other hosts have said, heard at once or kept for when it can be dealt with."""

from __future__ import annotations

import select
from collections.abc import Callable, Iterable

from lockstep.agent.host_messages import HostPaused, HostPresent, HostReady, StepRecorded
from lockstep.net.control_link import ControlLink
from lockstep.net.transport import Heard
from lockstep.system.look_clock import LookClock

QUIET = HostPresent | HostReady | StepRecorded | HostPaused
"""What a host may say while all do something together at rest, without its being called off."""


class Overdue:
    """For how long hosts have been waited for, each of them without a break."""

    def __init__(self) -> None:
        self._waited: dict[str, float] = {}
        self._clock = LookClock()

    def look(self, awaited: Iterable[str]) -> dict[str, float]:
        """By host that is waited for, the seconds since that began; others are forgotten."""
        passed, known = self._clock.passed(), self._waited
        self._waited = {name: known[name] + passed if name in known else 0.0 for name in awaited}
        return dict(self._waited)

    def moved(self, name: str) -> None:
        """A host has done something: its time begins anew."""
        self._waited.pop(name, None)


class HostInbox:
    """The one reader of a job's control link while the job runs."""

    def __init__(self, link: ControlLink, silent_seconds: float) -> None:
        """`silent_seconds`: a host without a sign of life for so long counts as silent."""
        self._link, self._silent_seconds = link, silent_seconds
        self.kept: list[Heard] = []
        """What was heard, and cannot be dealt with now."""

    def take(self) -> list[Heard]:
        """All that was heard, in order, with what had been kept."""
        kept, self.kept = self.kept, []
        return [*kept, *self._link.take()]

    def keep(self, seconds: float, handled: Callable[[Heard], bool]) -> None:
        """Hear for so many seconds, and keep what is not `handled`."""
        select.select([self._link], [], [], seconds)
        self.kept += [heard for heard in self._link.take() if not handled(heard)]

    def has_said(self, name: str) -> bool:
        """Whether something that this host has said is kept."""
        return any(heard.peer == name for heard in self.kept)

    def silent_for(self, name: str) -> float:
        """Seconds since this host's last sign of life."""
        return self._link.silent_for(name)

    def is_silent(self, name: str) -> bool:
        """Whether this host has given no sign of life for too long."""
        return self.silent_for(name) > self._silent_seconds

    def disturbs(self, names: Iterable[str], handled: Callable[[Heard], bool]) -> bool:
        """Whether one of these hosts is silent, or somebody says what has to be dealt with before
        all of them go on with what they do together."""
        self.keep(0.0, handled)
        return self.any_silent(names) or not all(
            isinstance(heard.message, QUIET) for heard in self.kept
        )

    def any_silent(self, names: Iterable[str]) -> bool:
        """Whether one of these hosts is silent."""
        return any(map(self.is_silent, names))
