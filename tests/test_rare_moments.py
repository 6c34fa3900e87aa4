"""Moments that a random fault hits once in a thousand runs, each brought about on purpose."""

from __future__ import annotations

from typing import Any

from torch import nn

from lockstep.faults import Fault
from lockstep.layout import cut_blocks, own_blocks
from tests.faulty import Yard, events, yard
from tests.zoo import CLASSES, FEATURES, Vectors

__all__ = ["yard"]  # a fixture


class OneBlock(Vectors):
    """One block and batch statistics: of three workers only the second owns anything."""

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(FEATURES, CLASSES, bias=False), nn.BatchNorm1d(CLASSES, affine=False)
        )


def test_an_audit_after_the_buffers_were_combined(yard: Yard) -> None:
    """Rank 0, which owns no block, has combined the buffers when the only owner goes away: shards
    that were computed again from them would not give the bytes that they gave before."""
    blocks = cut_blocks([FEATURES * CLASSES], [True])
    assert [len(part) for part in own_blocks(blocks, 3)] == [0, 1, 0]
    stop = Fault(seat=1, step=2, phase="update_begin", kind="stop")
    settings: dict[str, Any] = {"steps": 4, "batch_size": 26, "audit": 1.0, "stall_seconds": 0.5}
    result = yard.check(OneBlock(), faults=(stop,), **settings)
    (died,) = events(result.folder, "died")
    assert (died["step"], died["undone"]) == (2, True)
    assert events(result.folder, "corrupt") == []
