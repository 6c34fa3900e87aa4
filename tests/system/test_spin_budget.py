"""How often a word is looked at before a process sleeps."""

from __future__ import annotations

from lockstep.system.spin_budget import SHORT_SECONDS, SpinBudget

MOST = 20_000


def test_the_budget_falls_at_once_and_grows_by_short_waits() -> None:
    budget = SpinBudget(MOST)
    budget.learn(SHORT_SECONDS / 2)
    assert budget.spins == MOST
    budget.learn(2 * SHORT_SECONDS)
    assert budget.spins == 1
    seen = []
    while budget.spins < MOST:
        budget.learn(0.0)
        seen.append(budget.spins)
    assert seen[:3] == [2, 4, 8]
    assert seen[-1] == MOST
    assert len(seen) < 20


def test_a_budget_of_one_stays_one() -> None:
    budget = SpinBudget(1)
    budget.learn(0.0)
    assert budget.spins == 1
