"""Who sums and who updates what, for each kind of ownership: the same bits, whatever dies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lockstep
from lockstep.agent.regroup_messages import HostStatus
from lockstep.coordinator.host_membership import settle_parts
from lockstep.job.faults import Fault
from lockstep.planning.byte_ranges import ALIGN, ByteRange
from lockstep.planning.ownership import Ownership, Replicated, Servers, Sharded
from lockstep.planning.slot_map import SlotMap
from tests.support.harmed_runs import assert_same, events
from tests.support.multi_host_runs import (
    Site,
    check_joining_and_leaving,
    ended_well,
    site,
    slow,
    yard,
)

__all__ = ["site", "slow", "yard"]  # fixtures

KINDS: list[Ownership] = [Replicated(), Sharded(), Servers(frozenset("bd"))]
HOSTS = ("a", "b", "c", "d", "e")


def slot_map(sizes: Sequence[int]) -> SlotMap:
    """A slot with gradients of so many bytes."""
    grads, offset = {}, 0
    for param, nbytes in enumerate(sizes):
        grads[param] = ByteRange(offset=offset, nbytes=nbytes)
        offset += -(-nbytes // ALIGN) * ALIGN
    nothing = ByteRange(offset=offset, nbytes=0)
    return SlotMap(
        nbytes=offset, grads=grads, tables=(), buffers=nothing, packed=nothing, total=0, restored=0
    )


# The contract, for every kind.


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: type(kind).__name__)
@given(
    sizes=st.lists(st.integers(1, 3 << 20).map(lambda n: 4 * n), min_size=1, max_size=12),
    count=st.integers(1, 5),
)
def test_every_gradient_has_one_owner(kind: Ownership, sizes: list[int], count: int) -> None:
    hosts, places = HOSTS[:count], slot_map(sizes)
    computing = kind.computing(hosts)
    assert computing
    assert set(computing) <= set(hosts)
    duties = kind.duties(hosts, places)
    if duties.returns == "nothing":
        assert not duties.shares
        return
    assert tuple(duties.shares) == hosts
    runs = sorted(
        (run.offset, run.nbytes) for share in duties.shares.values() for run in share.sums
    )
    covered = [(bucket.place.offset, bucket.place.nbytes) for bucket in places.buckets]
    wanted = {byte for start, size in covered for byte in range(start, start + size, 4)}
    for start, size in runs:
        mine = set(range(start, start + size, 4))
        assert mine <= wanted, "a byte has two owners, or is none's to sum"
        wanted -= mine
    padding = {
        byte
        for byte in wanted
        if not any(r.offset <= byte < r.offset + r.nbytes for r in places.grads.values())
    }
    assert wanted == padding
    if duties.returns == "parameters":
        updated = sorted(param for share in duties.shares.values() for param in share.params)
        assert updated == list(places.grads)
        assert not kind.whole


def test_who_computes_and_who_updates() -> None:
    servers = Servers(frozenset("bd"))
    assert servers.computing(HOSTS) == ("a", "c", "e")
    assert servers.computing(("b",)) == ("b",), "rather than nobody"
    shares = servers.duties(("a", "b", "d"), slot_map([4096] * 4)).shares
    assert [len(shares[name].params) for name in "abd"] == [0, 2, 2]
    shares = servers.duties(("a", "c"), slot_map([4096] * 4)).shares
    assert [len(shares[name].params) for name in "ac"] == [2, 2], "rather than nobody"


def test_a_sum_is_cut_evenly_whatever_the_parameters() -> None:
    duties = Replicated().duties(HOSTS[:3], slot_map([4 * 784 * 512, 2048, 4 * 512 * 512, 40]))
    sizes = [sum(run.nbytes for run in share.sums) for share in duties.shares.values()]
    assert max(sizes) < 1.01 * sum(sizes) / 3


def standing(whole: int | None, base: int | None = 2) -> HostStatus:
    return HostStatus(whole=whole, base=base)


@pytest.mark.parametrize(
    ("steps", "before", "wanted"),
    [
        ({"m": 5, "b": 5}, "mb", (5, {"m": "keep", "b": "keep"})),  # a connection was lost
        ({"m": 5, "b": 6}, "mb", (2, {"m": "back", "b": "copy"})),  # its part is a step ahead
        ({"m": 5, "b": None}, "mb", (2, {"m": "back", "b": "copy"})),  # it is torn
        ({"m": 5}, "mb", (2, {"m": "back"})),  # b's part is lost
        ({"m": 5, "b": 5, "c": None}, "mb", (2, {"m": "back", "b": "copy", "c": "copy"})),
        ({"m": 2, "b": None}, "", (2, {"m": "back", "b": "copy"})),  # the run begins
    ],
)
def test_where_parts_go_on(
    steps: dict[str, int | None], before: str, wanted: tuple[int, dict[str, str]]
) -> None:
    found = settle_parts({n: standing(s) for n, s in steps.items()}, "m", frozenset(before))
    assert found == (wanted[0], "m", wanted[1])


# Runs.

SETTINGS: dict[str, dict[str, Any]] = {
    "sharded": {"ownership": "sharded"},
    "servers": {"ownership": "servers", "servers": ["c"]},
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(
    "name",
    [
        "mixture",  # parameters without gradients in some steps
        "clip",
        pytest.param("cnn", marks=pytest.mark.long),
        pytest.param("transformer", marks=pytest.mark.long),
        pytest.param("muon", marks=pytest.mark.long),
        pytest.param("embedding", marks=pytest.mark.long),
        pytest.param("channels-last", marks=pytest.mark.long),
        pytest.param("buffers", marks=pytest.mark.long),
    ],
)
def test_same_bits(site: Site, kind: str, name: str) -> None:
    on = site.agents({"b": 1, "c": 2}, 2)
    site.check(name, on, **SETTINGS[kind])
    ended_well(on)


@pytest.mark.parametrize("kind", SETTINGS)
def test_sparse_gradients(site: Site, kind: str) -> None:
    """Tables are updated on every host; only touched rows travel."""
    settings: dict[str, Any] = {
        "args": {"optimizer": "SparseAdam", "use": "two losses"}, "batch_size": 48, "steps": 8,
        "seed": 3, "shards": 4, "threads": 1, "quiet": True,
    }  # fmt: skip
    on = site.agents({"b": 1, "c": 1}, 2)
    task = "tests.collectives.test_sparse_gradients:Sparse"
    workers = 4 if kind == "sharded" else 3
    found = lockstep.run(
        task, on=on, workers=workers, out=site.yard.path(), **SETTINGS[kind], **settings
    )
    wanted = lockstep.run(task, workers=1, out=site.yard.path(), **settings)
    assert_same(found, wanted)
    ended_well(on)


# Deaths.


@pytest.mark.parametrize("phase", ["exchange", "return"])
def test_a_host_dies_that_sums_for_all(site: Site, phase: str) -> None:
    on = site.agents({"b": 1, "c": 1, "d": 1}, 1)
    faults = (
        Fault(worker_id=0, host="c", step=5, phase=phase, kind="host"),
        Fault(worker_id=0, host="b", step=9, phase=phase),  # and a worker
    )
    found = site.check("clip", on, steps=16, faults=faults)
    assert [event["host"] for event in events(found.folder, "host_lost")] == ["c"]
    died = [(event["host"], event["step"]) for event in events(found.folder, "died")]
    assert ("b", 9) in died
    ended_well(on, "c")


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_part_of_the_state_is_lost(site: Site, kind: str) -> None:
    """With its host, or in the middle of an update: all go back to the master's base."""
    on = site.agents({"b": 1, "c": 1, "d": 1}, 1)
    faults = (
        # A worker: its host goes on by itself. Beside a server it has two, and one may do all.
        Fault(worker_id=-1, host="d", step=7, phase="forward"),
        Fault(worker_id=0, host="c", step=11, phase="update_end"),
        Fault(worker_id=0, host="b", step=14, phase="return"),
        Fault(worker_id=0, host="c", step=18, phase="return", kind="host"),
    )
    found = site.check("channels-last", on, steps=24, faults=faults, **SETTINGS[kind])
    assert [event["host"] for event in events(found.folder, "host_lost")] == ["c"]
    died = {(event["host"], event["step"]) for event in events(found.folder, "died")}
    assert died >= {(fault.host, fault.step) for fault in faults if fault.kind == "kill"}
    ended_well(on, "c")


@pytest.mark.parametrize("kind", ["sharded", pytest.param("servers", marks=pytest.mark.long)])
def test_hosts_join_and_leave(site: Site, slow: None, kind: str) -> None:
    """The base is brought up to date before anybody is let in; a checkpoint has all parts."""
    check_joining_and_leaving(site, {"b": 1, "c": 1}, "d", "c", **SETTINGS[kind])
