"""Seeds: pure functions of their purpose, and the same ones as ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lockstep.system import seeding as seeds
from tests.support import reference_loop as reference


def test_seeds_are_what_they_have_always_been() -> None:
    """A change here changes the bits of every run that there is."""
    assert seeds.derive(0, "order", 0) == 3471081512423777433
    assert seeds.derive(3, "shard", 12, 5) == 2912888587245357034
    assert seeds.derive(3, "sample", -1, 7) == 6966365985986415199


@given(st.integers(0, 2**64), st.lists(st.integers(-1, 2**40), max_size=3))
def test_seeds_are_63_bits_and_documented(seed: int, numbers: list[int]) -> None:
    value = seeds.derive(seed, "shard", *numbers)
    assert 0 <= value < 2**63
    assert value == reference.derive(seed, "shard", *numbers)


def test_seeds_of_near_numbers_differ() -> None:
    found = {seeds.derive(0, "shard", step, shard) for step in range(50) for shard in range(50)}
    assert len(found) == 2500
    assert seeds.derive(0, "shard", 1, 11) != seeds.derive(0, "shard", 11, 1)
