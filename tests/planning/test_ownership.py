"""Ownership: each gradient and each parameter has one owner, for every kind of ownership."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.errors import JobError
from lockstep.job.job import Job
from lockstep.planning.byte_ranges import ALIGN, ByteRange
from lockstep.planning.core_split import Facts
from lockstep.planning.host_role import HostRole
from lockstep.planning.host_split import decompose_over_hosts
from lockstep.planning.ownership import Ownership, Replicated, Servers, Sharded, Slices
from lockstep.planning.slot_map import SlotMap

KINDS: list[Ownership] = [Replicated(), Sharded(), Servers(frozenset("bd"))]
HOSTS = ("a", "b", "c", "d", "e")


def slot_map(sizes: Sequence[int], slice_of: Mapping[int, int] | None = None) -> SlotMap:
    """A slot with gradients of so many bytes, of which some are slices."""
    grads, offset = {}, 0
    for param, nbytes in enumerate(sizes):
        grads[param] = ByteRange(offset=offset, nbytes=nbytes)
        offset += -(-nbytes // ALIGN) * ALIGN
    nothing = ByteRange(offset=offset, nbytes=0)
    return SlotMap(
        nbytes=offset, grads=grads, tables=(), buffers=nothing, packed=nothing, total=0, restored=0,
        slice_of=dict(slice_of or {}),
    )  # fmt: skip


def joined(runs: Sequence[ByteRange]) -> list[tuple[int, int]]:
    """The bytes of the runs, as few intervals."""
    found: list[tuple[int, int]] = []
    for run in sorted(runs, key=lambda run: run.offset):
        start, stop = run.offset, run.offset + run.nbytes
        if found and start <= found[-1][1]:
            start, stop = found[-1][0], max(found.pop()[1], stop)
        found.append((start, stop))
    return found


def inside(interval: tuple[int, int], intervals: Sequence[tuple[int, int]]) -> bool:
    return any(start <= interval[0] and interval[1] <= stop for start, stop in intervals)


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
    runs = [run for share in duties.shares.values() for run in share.sums]
    summed, covered = joined(runs), joined([bucket.byte_range for bucket in places.buckets])
    assert sum(stop - start for start, stop in summed) == sum(run.nbytes for run in runs), (
        "a byte has two owners"
    )
    assert all(inside(run, covered) for run in summed), "a byte is summed that is none's to sum"
    for grad in places.grads.values():
        assert inside((grad.offset, grad.offset + grad.nbytes), summed), "a byte has no owner"
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


@given(slices=st.integers(1, 9), matrices=st.integers(1, 5), count=st.integers(1, 6))
def test_each_slice_is_on_one_host(slices: int, matrices: int, count: int) -> None:
    """Those of one number together; and what is not cut is nobody's alone."""
    slice_of = {2 * index: index % slices for index in range(matrices * slices)}
    places = slot_map([64] * 2 * matrices * slices, slice_of)
    hosts = tuple(f"host{number}" for number in range(count))
    if count > slices:
        with pytest.raises(JobError, match="more hosts than slices"):
            Slices().duties(hosts, places)
        return
    duties = Slices().duties(hosts, places)
    if count == 1:
        assert not duties.shares
        return
    assert duties.returns == "digests"
    assert tuple(duties.shares) == hosts
    owned = [param for share in duties.shares.values() for param in share.params]
    assert sorted(owned) == sorted(slice_of), "one owner of each"
    numbers = [{slice_of[param] for param in share.params} for share in duties.shares.values()]
    assert all(numbers), "nobody has none"
    assert sum(map(len, numbers)) == slices


def test_hosts_that_have_slices_compute_all_shards() -> None:
    plan = decompose_over_hosts(
        Job(task="tests.zoo:named", steps=2, batch_size=8, shards=4, slices=3, ownership="slices"),
        Facts(cores=4, train_samples=64, eval_samples=8), {"a": 4, "b": 2}, {},
    )  # fmt: skip
    assert plan.workers == 4, "two on each: each has a partner"
    places = slot_map([64] * 6, {0: 0, 1: 1, 2: 2})
    role = HostRole.alone("b", plan, Slices())
    assert not role.together
    role = role.among({"a": 2, "b": 2}, places, 5)
    assert role.together
    assert role.parted
    assert [part.shards for part in role.placement.parts] == [range(4)] * 2
    assert role.subtrees == ()
    assert (role.placement.teams, role.position, role.generation) == (2, 1, 5)
    assert role.remote_params == [0, 1]
    with pytest.raises(JobError, match="compute shards together"):
        decompose_over_hosts(
            Job(task="tests.zoo:named", shards=4, slices=3, ownership="slices", workers=3),
            Facts(cores=4, train_samples=64, eval_samples=8), {"a": 4, "b": 2}, {},
        )  # fmt: skip
