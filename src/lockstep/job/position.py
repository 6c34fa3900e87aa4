"""Where in a run a call of the task's methods belongs: what every worker knows of it alike."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Position:
    """What `Task.told` is told. It depends on the run alone, never on who computes."""

    training: bool
    """Whether a step is computed; else held-out data, or records, are."""
    step: int
    """How many steps are committed."""
    steps: int
    """How many the run was planned with."""
    steps_per_epoch: int
    """How many there are in a data epoch."""
    batch: int
    """Training: the step's number in its data epoch, which all its shards share. Else: the
    batch's number among the held-out batches."""
    samples: int
    """How many samples the batch, or the shard of it, has."""

    @property
    def data_epoch(self) -> int:
        """The data epoch of the step; of held-out data, the one that the last step was of."""
        return max(self.step - (not self.training), 0) // self.steps_per_epoch

    def at_step(self, step: int, samples: int) -> Position:
        """The place of a shard of so many samples in a step."""
        batch = step % self.steps_per_epoch
        return dataclasses.replace(self, training=True, step=step, batch=batch, samples=samples)

    def at_batch(self, step: int, batch: int, samples: int) -> Position:
        """The place of a held-out batch, after so many steps."""
        return dataclasses.replace(self, training=False, step=step, batch=batch, samples=samples)

    def within(self, update: int, updates: int) -> Position:
        """The same place, counted in updates, where a step is a round of so many of them."""
        batch = self.batch * updates + update if self.training else self.batch
        return dataclasses.replace(
            self,
            step=self.step * updates + update,
            steps=self.steps * updates,
            steps_per_epoch=self.steps_per_epoch * updates,
            batch=batch,
        )
