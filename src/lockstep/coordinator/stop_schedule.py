"""Stop schedule: at which steps a run comes to rest, and for what."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class StopSchedule:
    """At which steps the run comes to rest, and for what."""

    steps: int
    steps_per_epoch: int
    evaluate: bool = False
    evaluate_end: bool = True
    """With `evaluate`: whether also after the last step, where no data epoch ends."""
    checkpoint_steps: int | None = None
    checkpoint_seconds: float | None = None
    automatic: bool = False
    """Whether checkpoints are written without being asked for: see `checkpoint_timer`."""
    seconds: float | None = None
    """Stop for good when so many seconds of steps have been timed."""
    ahead_seconds: float = 0.5
    """How far the lease runs ahead of what has been recorded."""

    def evaluates_at(self, step: int) -> bool:
        """Whether held-out data are evaluated after `step` committed steps."""
        ends = step > 0 and step % self.steps_per_epoch == 0
        ends = ends or (step == self.steps and self.evaluate_end)
        return self.evaluate and ends

    def checkpoints_at(self, step: int) -> bool:
        """Whether a checkpoint is written after `step` committed steps."""
        every = self.checkpoint_steps
        return step == self.steps or (every is not None and step > 0 and step % every == 0)

    def epoch_end(self, step: int) -> int:
        """The first end of a data epoch that is not before `step`."""
        return -(-step // self.steps_per_epoch) * self.steps_per_epoch

    def next_stop(self, step: int) -> int:
        """The first stop after `step`."""
        stops = [self.steps]
        if self.evaluate:
            stops.append((step // self.steps_per_epoch + 1) * self.steps_per_epoch)
        if self.checkpoint_steps is not None:
            stops.append((step // self.checkpoint_steps + 1) * self.checkpoint_steps)
        return min(stops)
