"""Exchange thread: gradients are sent early only where it pays."""

from __future__ import annotations

from lockstep.collectives.exchange_thread import Early


def test_early_only_where_it_pays() -> None:
    assert Early(10**6, spare=True).at(64)
    early = Early(10**6, spare=False)
    assert not early.at(1)
    early.took(0.1)  # 10 MB a second
    assert early.at(65)
    assert not early.at(128), "one step in so many is measured"
    early.took(0.001)
    assert not early.at(129)
