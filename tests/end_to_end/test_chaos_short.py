"""A short chaos: a few runs harmed at random. `make chaos` goes on for as long as one likes."""

from __future__ import annotations

from benchmarks.chaos import MASTERS, chaos
from benchmarks.harm import SCENARIOS


def test_runs_harmed_at_random() -> None:
    names = list(SCENARIOS)
    tally = chaos(seed=7, faults=20, seconds=60, names=[names[0], names[6], MASTERS], loud=False)
    assert tally.problems == []
    assert tally.faults >= 10
