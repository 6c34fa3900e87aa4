"""Run observer: where committed steps go: a run folder, or a ledger that is being verified."""

from __future__ import annotations

from typing import Any, Protocol

from lockstep.results.ledger import StepRecord


class RunObserver(Protocol):
    """Receives the history of a run, in order. All calls come from the coordinator's thread."""

    def commit(self, record: StepRecord) -> None:
        """A step has been committed on every worker."""

    def event(self, name: str, **fields: object) -> None:
        """Something happened that people may want to know."""

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """The held-out metrics after `step` committed steps."""

    def progress(self, step: int, loss: float, rate: float, workers: int) -> None:
        """About every tick: how far the run is; `rate` is in samples per second."""

    def recovered(self, recoveries: list[dict[str, Any]]) -> None:
        """Recoveries that have been completed, as the result lists them."""

    def busy(self) -> bool:
        """Whether the last checkpoint is still being written."""

    def writing_seconds(self) -> float:
        """Seconds of a core that writing the last checkpoint took."""

    def settle(self) -> None:
        """Wait until it is written: its copy of the state may be overwritten then."""

    def checkpoint(self, step: int, state: memoryview) -> None:
        """A consistent copy of the state segment after `step` committed steps.

        It stays as it is until `settle` has returned.
        """


class NullObserver:
    """Keeps nothing; for trials."""

    def commit(self, record: StepRecord) -> None:
        pass

    def event(self, name: str, **fields: object) -> None:
        pass

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def progress(self, step: int, loss: float, rate: float, workers: int) -> None:
        pass

    def recovered(self, recoveries: list[dict[str, Any]]) -> None:
        pass

    def busy(self) -> bool:
        return False

    def writing_seconds(self) -> float:
        return 0.0

    def settle(self) -> None:
        pass

    def checkpoint(self, step: int, state: memoryview) -> None:
        pass
