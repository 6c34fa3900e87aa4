"""Position: where in a run a call of the task's methods belongs; the same on every worker."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Position:
    """Position in the run, for `Task.set_position`. It does not depend on who computes."""

    training: bool
    """Whether a training step is computed; otherwise held-out data or records are."""
    step: int
    """The number of committed steps."""
    steps: int
    """The number of steps that the run was planned with."""
    steps_per_epoch: int
    """The number of steps in a data epoch."""
    batch: int
    """In training the step's number in its data epoch, the same for all its shards; otherwise the
    batch's number among the held-out batches."""
    samples: int
    """The number of samples in the batch, or in the shard."""

    @property
    def data_epoch(self) -> int:
        """The data epoch of the step; for held-out data, that of the last committed step."""
        return max(self.step - (not self.training), 0) // self.steps_per_epoch

    def at_step(self, step: int, samples: int) -> Position:
        """The position of a shard of so many samples in a step."""
        batch = step % self.steps_per_epoch
        return dataclasses.replace(self, training=True, step=step, batch=batch, samples=samples)

    def at_batch(self, step: int, batch: int, samples: int) -> Position:
        """The position of a held-out batch, after so many steps."""
        return dataclasses.replace(self, training=False, step=step, batch=batch, samples=samples)

    def within(self, update: int, updates: int) -> Position:
        """The same position, counted in updates, where a step is a local SGD round of `updates`."""
        batch = self.batch * updates + update if self.training else self.batch
        return dataclasses.replace(
            self,
            step=self.step * updates + update,
            steps=self.steps * updates,
            steps_per_epoch=self.steps_per_epoch * updates,
            batch=batch,
        )
