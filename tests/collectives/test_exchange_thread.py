"""Exchange thread: when gradients are sent early, for how long others are waited for, and what of
theirs is not taken for true."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from lockstep.agent.stall_policy import StallTimeout
from lockstep.collectives.exchange_plan import ExchangePlan
from lockstep.collectives.exchange_thread import Early, ExchangeThread
from lockstep.errors import PeerTimeoutError, ProtocolError
from lockstep.planning.byte_ranges import ByteRange
from lockstep.planning.shard_placement import HostShards
from lockstep.planning.slot_map import TableMap
from lockstep.state.control_segment import ControlSegment, ControlShape
from lockstep.system.shared_memory import Segment


def test_early_only_where_it_pays() -> None:
    assert Early(10**6, spare=True).at(64)
    early = Early(10**6, spare=False)
    assert not early.at(1)
    early.took(0.1)  # 10 MB a second
    assert early.at(65)
    assert not early.at(128), "one step in so many is measured"
    early.took(0.001)
    assert not early.at(129)


ROWS, ROW_BYTES = 16, 8


def received(count: int, indices: Sequence[int], flag: int = 1) -> tuple[ExchangePlan, HostShards]:
    """A plan in whose memory a host has sent the rows of a table of 16."""
    where = ByteRange(offset=ROWS * ROW_BYTES, nbytes=8 * (ROWS + 1))
    rows = ByteRange(offset=0, nbytes=ROWS * ROW_BYTES)
    slot = np.zeros((where.offset + where.nbytes) // 8, np.int64)
    slot[ROWS] = count
    slot[ROWS + 1 : ROWS + 1 + len(indices)] = indices
    plan = object.__new__(ExchangePlan)
    table = TableMap(rows=rows, row_bytes=ROW_BYTES, row_indices=where)
    plan.places = SimpleNamespace(nbytes=slot.nbytes, tables=[table])  # type: ignore[assignment]
    plan.control = SimpleNamespace(  # type: ignore[assignment]
        has_grad=np.full((1, 1), flag, np.uint8)
    )
    plan._slots, plan._leaves = memoryview(slot.tobytes()), {0: 0}
    return plan, HostShards(name="b", workers=1, shards=range(1), subtrees=(range(1),))


@pytest.mark.parametrize("count", [-1, 0, 1, 16])
def test_rows_that_can_be(count: int) -> None:
    plan, sender = received(count, range(max(count, 0)))
    plan.check(sender)
    plan.check_rows(sender)


@pytest.mark.parametrize(
    ("count", "flag"), [(2**62, 1), (160, 1), (17, 1), (-2, 1), (-(2**63), 1), (1, 3), (1, 255)]
)
def test_counts_and_flags_that_cannot_be(count: int, flag: int) -> None:
    plan, sender = received(count, [], flag)
    with pytest.raises(ProtocolError, match="host b sends"):
        plan.check(sender)


@pytest.mark.parametrize("indices", [[1, 1], [2, 1], [-1, 3], [3, 16], [0, 2**62]])
def test_rows_that_cannot_be(indices: list[int]) -> None:
    plan, sender = received(len(indices), indices)
    with pytest.raises(ProtocolError, match="host b sends indices"):
        plan.check_rows(sender)


@pytest.mark.parametrize(
    ("count", "names", "ok"),
    [
        (0, b"", True),
        (2, b'["a", "b"]', True),
        (17, b'["a"]', False),
        (-1, b"", False),
        (2, b'["a"]', False),
        (1, b"", False),
        (1, b'"a"', False),
        (1, b"[1]", False),
        (2, b'["a", "a"]', False),
        (1, b"[", False),
        (1, b"\xff", False),
    ],
)
def test_what_a_host_says_that_it_has_logged(count: int, names: bytes, ok: bool) -> None:
    plan, sender = received(0, [])
    shape = ControlShape(shards=1, max_workers=1, params=1)
    with contextlib.closing(ControlSegment(Segment.create("c", shape.nbytes()), shape)) as control:
        plan.control = control
        control.logged_counts[3, 0], control.names_bytes[3, 0] = count, len(names)
        control.names[0, : len(names)] = list(names)
        with contextlib.nullcontext() if ok else pytest.raises(ProtocolError, match="host b sends"):
            plan.check_counts(3, sender)
            plan.check_names(3, sender)


def test_a_length_of_names_that_cannot_be() -> None:
    plan, sender = received(0, [])
    shape = ControlShape(shards=1, max_workers=1, params=1)
    with contextlib.closing(ControlSegment(Segment.create("c", shape.nbytes()), shape)) as control:
        plan.control = control
        for length in (-1, 513, 2**31 - 1):
            control.names_bytes[3, 0] = length
            with pytest.raises(ProtocolError, match="host b sends a length"):
                plan.check_counts(3, sender)


class Never:
    """A tensor that does not come."""

    peer, what, ended = "b", "a tensor", False

    def done(self) -> bool:
        return False

    def wait(self, timeout: float) -> None:
        time.sleep(timeout)
        raise PeerTimeoutError("host b did not answer in time")


def test_who_exchanges_nothing_is_named() -> None:
    thread = object.__new__(ExchangeThread)
    thread._stop, thread._limit = threading.Event(), lambda: 0.3
    begun = time.monotonic()
    with pytest.raises(PeerTimeoutError, match="host b exchanges nothing"):
        thread._await_all([Never()])
    assert 0.25 < time.monotonic() - begun < 5.0
    assert not thread.awaited


def test_how_long_one_waits_for_another_host() -> None:
    patience = StallTimeout(None)
    assert patience.exchange_limit() == 600.0, "nothing is known yet"
    assert patience.hurried() == 30.0
    for _ in range(3):
        patience.step_took(0.1)
    assert patience.exchange_limit() == 60.0
    assert patience.exchange_limit(first=True) == 600.0
    assert patience.hurried() == 5.0
    patience.step_took(40.0)
    assert patience.exchange_limit() == 800.0
    assert patience.hurried() == 120.0
    assert StallTimeout(900.0).exchange_limit() == 1800.0
