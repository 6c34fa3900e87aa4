"""Settings that change numbers: which are tried, and that a plan never takes one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.job.job import SETTINGS, Job
from lockstep.planning.core_split import shards_of
from lockstep.planning.variations import variations


def test_one_setting_at_a_time_and_all_of_them_change_numbers() -> None:
    found = variations(Job(task="t", batch_size=64), 4, 4)
    assert found == [
        {"shards": 1}, {"shards": 2}, {"shards": 8}, {"threads": 2}, {"threads": 4},
        {"precision": "bf16"},
    ]  # fmt: skip
    assert all(SETTINGS[name].declared.changes_numbers for each in found for name in each)


@pytest.mark.parametrize(
    ("job", "names"),
    [
        (Job(task="t", batch_size=1), {"precision"}),
        (Job(task="t", workers=4), {"shards", "precision"}),
        (Job(task="t", precision="bf16", threads=2), {"shards"}),
        (Job(task="t", compression="int8", groups=4), {"shards", "precision"}),
    ],
)
def test_what_does_not_fit_is_left_out(job: Job, names: set[str]) -> None:
    found = variations(job, shards_of(job), 2 if job.threads else 1)
    assert {name for each in found for name in each} == names


@given(batch=st.integers(1, 4096), cores=st.integers(1, 64), workers=st.integers(1, 4))
def test_each_of_them_is_a_job(batch: int, cores: int, workers: int) -> None:
    job = Job(task="t", batch_size=max(batch, workers * 4), workers=workers)
    for settings in variations(job, shards_of(job), cores):
        changed = job.replace(**settings)
        assert shards_of(changed) >= workers
