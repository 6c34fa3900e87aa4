"""A short chaos: two runs harmed at random. `make chaos` goes on for as long as one likes."""

from __future__ import annotations

from benchmarks.chaos import chaos


def test_two_runs_harmed_at_random() -> None:
    tally = chaos(seed=7, faults=12, seconds=60, models=("mlp", "cnn"), loud=False)
    assert tally.failures == []
    assert tally.differences == []
    assert tally.faults >= 8
