"""Where in a run a call belongs, as a task is told."""

from __future__ import annotations

from lockstep.job.position import Position
from lockstep.optim.local_sgd import LocalSGD
from tests.support.named_tasks import Blobs

BEGINNING = Position(training=True, step=0, steps=10, steps_per_epoch=4, batch=0, samples=16)


class Told(Blobs):
    def set_position(self, position: Position) -> None:
        self.position = position


def test_steps_and_held_out_batches() -> None:
    """A held-out batch belongs to the data epoch that has just ended, a step to its own."""
    step = BEGINNING.at_step(8, samples=5)
    assert (step.step, step.data_epoch, step.batch, step.samples) == (8, 2, 0, 5)
    held_out = BEGINNING.at_batch(8, batch=3, samples=2)
    assert (held_out.step, held_out.data_epoch, held_out.batch) == (8, 1, 3)
    assert BEGINNING.at_batch(0, batch=3, samples=2).data_epoch == 0


def test_updates_within_rounds() -> None:
    """A task with local steps counts its own updates; its held-out batches are as ever."""
    task = Told()
    rounds = LocalSGD(task, 3)
    rounds.set_position(BEGINNING.at_step(5, samples=9))
    assert (task.position.step, task.position.batch, task.position.steps) == (15, 3, 30)
    rounds.begin_update(2)
    assert (task.position.step, task.position.batch, task.position.data_epoch) == (17, 5, 1)
    rounds.set_position(BEGINNING.at_batch(8, batch=1, samples=9))
    assert (task.position.step, task.position.batch, task.position.data_epoch) == (24, 1, 1)
