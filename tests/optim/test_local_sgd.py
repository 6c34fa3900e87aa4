"""Local SGD: a shard's samples divided among the local steps of a round."""

from __future__ import annotations

import pytest

from lockstep.optim.local_sgd import divide


@pytest.mark.parametrize(("count", "parts"), [(12, [4, 4, 4]), (7, [2, 2, 3]), (2, [1, 1])])
def test_samples_are_divided(count: int, parts: list[int]) -> None:
    found = divide(list(range(count)), 3)
    assert [len(part) for part in found] == parts
    assert [item for part in found for item in part] == list(range(count))
