"""A run in the background: `start` returns at once, and the handle steers it."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from lockstep.api.training import run
from lockstep.coordinator.run_control import RunControl
from lockstep.job.run_request import Taskish
from lockstep.results.result import Result


class Run:
    """A run that goes on in a thread of this process. Requests take effect at a step's end."""

    def __init__(self, task: Taskish, args: Mapping[str, Any] | None, options: dict[str, Any]):
        self._control = RunControl()
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._work, args=(task, args, options), name="lockstep", daemon=False
        )
        self._thread.start()

    def _work(self, task: Taskish, args: Mapping[str, Any] | None, options: dict[str, Any]) -> None:
        try:
            self._result = run(task, args=args, control=self._control, **options)
        except BaseException as error:  # handed to whoever asks for the result
            self._error = error

    def scale(self, workers: int) -> None:
        """Go on with another number of workers, at most `max_workers`. No bit changes.

        Raises:
            JobError: the run cannot have so many, or so few.
        """
        self._control.add("scale", workers)

    def checkpoint(self) -> None:
        """Write a checkpoint soon."""
        self._control.add("checkpoint")

    def pause(self) -> None:
        """Come to rest and stay there until `unpause`."""
        self._control.add("pause")

    def unpause(self) -> None:
        """Go on after `pause`."""
        self._control.add("go_on")

    def stop(self) -> None:
        """Stop with a checkpoint; `result` then raises `StoppedError`."""
        self._control.add("stop")

    @property
    def running(self) -> bool:
        """Whether the run is still under way."""
        return self._thread.is_alive()

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the result, for `timeout` seconds at the most.

        Raises:
            TimeoutError: the run is still under way.
            LockstepError: what `run` raised.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError("the run is still under way")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result


def start(task: Taskish, *, args: Mapping[str, Any] | None = None, **options: Any) -> Run:
    """Start a run in the background; the arguments are those of `run`."""
    return Run(task, args, options)
