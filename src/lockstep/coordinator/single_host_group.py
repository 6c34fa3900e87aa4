"""Single host group: a host group of one, in which nobody has to be asked or told."""

from __future__ import annotations

from collections.abc import Callable

from lockstep.agent.evaluation_rounds import OwnShare
from lockstep.planning.metric_decisions import Told


class WholeState:
    """The host has the whole state."""

    def due(self) -> bool:
        return False

    def collect(self) -> bool:
        return True


class SingleHostGroup:
    """The master's own host, alone."""

    def __init__(self) -> None:
        self.share = OwnShare()
        self.parts = WholeState()

    def stop_wanted(self, wanted: Callable[[], bool]) -> None:
        pass

    def begin(self) -> None:
        pass

    def look(self) -> None:
        pass

    def lease(self, step: int) -> None:
        pass

    def tell_metric(self, told: Told) -> None:
        pass

    def let_in(self) -> None:
        pass

    def end(self) -> None:
        pass
