"""Parts collector: the parts of the state that single hosts alone have, put together at the master.

Where ownership is sharded, or parameter servers update, no host has the whole state. The master's
snapshot is then the one state that is whole, as old as the last collection.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from lockstep.agent.host_messages import SendState
from lockstep.agent.host_regroup import HostRegroup
from lockstep.coordinator.host_inbox import HostInbox
from lockstep.net.control_link import ControlLink
from lockstep.net.transport import Heard

PARTS_SECONDS, PARTS_SHARE = 10.0, 0.02
"""Between two collections; longer, where that would take more of a run's time than this share. The
loss of a host costs the steps since."""


class PartsCollector:
    """Collects the parts while all hosts rest."""

    def __init__(
        self,
        regroup: HostRegroup,
        inbox: HostInbox,
        link: ControlLink,
        newcomers: Callable[[], bool],
        handled: Callable[[Heard], bool],
    ) -> None:
        """`newcomers`: whether hosts wait to be let in, which begin with the snapshot; `handled`:
        deals with a message that can be dealt with at once."""
        self._regroup, self._inbox, self._link = regroup, inbox, link
        self._newcomers, self._handled = newcomers, handled
        self._collected_at = time.monotonic()
        self._took = 0.0
        """Seconds: how long the last collection took."""

    def due(self) -> bool:
        group = self._regroup.group
        if group.role.ownership.whole or group.observer.busy():
            return False
        pause = max(PARTS_SECONDS, self._took / PARTS_SHARE)
        late = group.role.parted and time.monotonic() - self._collected_at > pause
        return late or self._newcomers()

    def collect(self) -> bool:
        group = self._regroup.group
        if group.role.ownership.whole:
            return True
        group.throughput.rest()
        group.observer.settle()
        begun = time.monotonic()
        if group.role.parted and not self._gather():
            return False
        group.memory.snapshot.take(group.step, group.role.kept(group.memory.layout))
        self._collected_at = time.monotonic()
        self._took = self._collected_at - begun
        return True

    def _gather(self) -> bool:
        """Get the other hosts' parts. False: one is lost, or has a trouble."""
        group = self._regroup.group
        for name in group.role.others:
            self._link.tell(name, SendState(step=group.step))
        return self._regroup.take_parts(self._undisturbed)

    def _undisturbed(self) -> bool:
        """Whether nobody has said, since all rest, that it cannot go on."""
        return not self._inbox.disturbs(self._regroup.group.role.others, self._handled)
