"""Plans: every setting decided, or refused."""

from __future__ import annotations

import pytest

from lockstep.errors import JobError
from lockstep.job.job import Job
from lockstep.planning.core_split import Division, Facts
from lockstep.planning.plan import decompose

FACTS = Facts(train_samples=640, eval_samples=0, cores=2)
DIVISION = Division(workers=1, threads=1, shards=4)


@pytest.mark.parametrize(("epochs", "steps"), [(0.0, 0), (0.1, 1), (0.5, 5), (1.0, 10), (2.5, 25)])
def test_parts_of_data_epochs(epochs: float, steps: int) -> None:
    assert decompose(Job(task="t", data_epochs=epochs), FACTS, DIVISION).steps == steps


def test_a_part_of_a_data_epoch_that_is_no_step_is_refused() -> None:
    with pytest.raises(JobError, match="is no step"):
        decompose(Job(task="t", data_epochs=0.01), FACTS, DIVISION)
