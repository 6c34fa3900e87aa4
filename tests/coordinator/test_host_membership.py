"""Who the hosts are and where they go on: the pure machine, and who sums what."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lockstep.agent.regroup_messages import HostStatus
from lockstep.collectives.exchange_thread import Early
from lockstep.coordinator import host_membership as host_membership
from lockstep.coordinator.host_membership import (
    HostMembership,
    PauseHosts,
    ResumeHosts,
    decide,
    settle,
)
from lockstep.errors import JobError
from lockstep.planning.byte_ranges import ByteRange
from lockstep.planning.reduction_tree import Node, leaf_slots, most_subtrees, subtrees, tree
from lockstep.planning.shard_placement import ShardPlacement, share
from lockstep.planning.slot_map import fill_buckets

# Who sums what.


def as_one_would(node: Node | None, places: Mapping[int, Node]) -> Node | None:
    """A tree whose leaves are replaced by the trees that their slots hold."""
    if node is None or isinstance(node, int):
        return None if node is None else places[node]
    left, right = (as_one_would(child, places) for child in node)
    assert left is not None
    assert right is not None
    return left, right


@given(st.data())
def test_hosts_sum_the_tree_that_one_host_sums(data: st.DataObject) -> None:
    """Also where some shards have no gradient, and hosts differ in their numbers of workers."""
    shards = data.draw(st.integers(1, 40))
    counts = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    present = data.draw(st.lists(st.booleans(), min_size=shards, max_size=shards))
    workers = {f"h{i}": count for i, count in enumerate(counts)}
    arrangement = ShardPlacement.of(shards, workers)
    trees = arrangement.subtrees
    assert [shard for each in trees for shard in each] == list(range(shards))
    places: dict[int, Node] = {}
    for each in trees:
        inside = tree(tuple(has and shard in each for shard, has in enumerate(present)))
        if inside is not None:
            places[each.start] = inside
    outer = tree(tuple(shard in places for shard in range(shards)))
    assert as_one_would(outer, places) == tree(tuple(present))


@given(st.integers(1, 60), st.data())
def test_room_for_sums(shards: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, shards - 1))
    last = data.draw(st.integers(first + 1, shards))
    mine = range(first, last)
    parts = [*subtrees(shards, 0, first), *subtrees(shards, first, last)]
    slots = leaf_slots(parts, mine, shards)
    behind = [slot for slot in slots.values() if slot >= shards]
    assert len(behind) == len(set(behind)) <= most_subtrees(shards)
    assert all(slots[part.start] == part.start for part in parts if part.start < first)


def test_hosts_with_a_power_of_two_of_shards_send_one_sum_each() -> None:
    for hosts, each in itertools.product((2, 4, 8), (1, 2, 4)):
        arrangement = ShardPlacement.of(hosts * each, {str(i): each for i in range(hosts)})
        assert len(arrangement.subtrees) == hosts


@given(st.lists(st.integers(1, 400_000), min_size=1, max_size=30), st.sets(st.integers(0, 29)))
def test_buckets_have_every_gradient_once(sizes: list[int], tables: set[int]) -> None:
    places, offset = {}, 0
    for index, size in enumerate(sizes):
        if index not in tables:
            places[index] = ByteRange(offset=offset, nbytes=4 * size)
        offset += -(-4 * size // 256) * 256
    buckets = fill_buckets(places)
    assert sorted(param for bucket in buckets for param in bucket.params) == sorted(places)
    for bucket in buckets:
        assert list(bucket.params) == sorted(bucket.params, reverse=True)
        low, high = places[bucket.params[-1]], places[bucket.params[0]]
        assert bucket.place == ByteRange(
            offset=low.offset, nbytes=high.offset + high.nbytes - low.offset
        )
        assert not any(low.offset <= places[t].offset < high.offset for t in tables & places.keys())


def test_early_only_where_it_pays() -> None:
    assert Early(10**6, spare=True).at(64)
    early = Early(10**6, spare=False)
    assert not early.at(1)
    early.took(0.1)  # 10 MB a second
    assert early.at(65)
    assert not early.at(128), "one step in so many is measured"
    early.took(0.001)
    assert not early.at(129)


def test_workers_are_shared_out() -> None:
    assert share(6, {"a": 2, "b": 1}) == {"a": 4, "b": 2}
    assert share(3, {"a": 1, "b": 1, "c": 1}) == {"a": 1, "b": 1, "c": 1}
    with pytest.raises(JobError, match="too few workers"):
        share(2, {"a": 8, "b": 8, "c": 8})


# Where hosts go on.


def standing(whole: int | None, base: int | None = None) -> HostStatus:
    return HostStatus(whole=whole, base=base)


@pytest.mark.parametrize(
    ("standings", "step", "source", "actions"),
    [
        ({"m": standing(5), "b": standing(5)}, 5, "m", {"m": "keep", "b": "keep"}),
        ({"m": standing(5), "b": standing(6)}, 6, "b", {"m": "copy", "b": "keep"}),
        ({"m": standing(None, 3), "b": standing(6)}, 6, "b", {"m": "copy", "b": "keep"}),
        ({"m": standing(6), "b": standing(None, 6)}, 6, "m", {"m": "keep", "b": "back"}),
        ({"m": standing(None, 3), "b": standing(None, 3)}, 3, "m", {"m": "back", "b": "back"}),
        ({"m": standing(None, 3), "b": standing(None, 4)}, 4, "b", {"m": "copy", "b": "back"}),
        ({"m": standing(7), "new": standing(None)}, 7, "m", {"m": "keep", "new": "copy"}),
    ],
)
def test_the_newest_whole_state_counts(
    standings: dict[str, HostStatus], step: int, source: str, actions: dict[str, str]
) -> None:
    assert settle(standings, "m") == (step, source, actions)


def run(*events: host_membership.Event) -> tuple[HostMembership, list[host_membership.Command]]:
    state = HostMembership(master="m")
    said: list[host_membership.Command] = []
    for event in events:
        state, commands, reason = decide(state, event)
        assert reason
        said += commands
    return state, said


BOTH = (host_membership.HostReady("m", 1), host_membership.HostReady("b", 2))


def test_all_stand_before_any_goes_on() -> None:
    state, said = run(*BOTH, host_membership.HostPaused("m", 2, standing(0)))
    assert said == [PauseHosts(1), PauseHosts(2)]
    state, (order,), _ = decide(state, host_membership.HostPaused("b", 2, standing(None)))
    assert isinstance(order, ResumeHosts)
    assert (order.workers, order.source) == ({"m": 1, "b": 2}, "m")
    assert order.actions == {"m": "keep", "b": "copy"}
    assert not state.regrouping


def test_what_is_said_of_an_earlier_generation_is_not_heard() -> None:
    state, _ = run(*BOTH)
    for event in (
        host_membership.HostPaused("b", 1, standing(9)),
        host_membership.ExchangeFailed("b", 1, "m", "old"),
    ):
        assert decide(state, event)[:2] == (state, ())


def test_a_loss_begins_another_generation() -> None:
    state, _ = run(
        *BOTH,
        host_membership.HostPaused("m", 2, standing(0)),
        host_membership.HostPaused("b", 2, standing(0)),
    )
    state, lost, reason = decide(state, host_membership.HostLost("b", "it died"))
    assert lost == (host_membership.AbandonHost("b", "it died"), PauseHosts(3))
    assert "b" in reason
    assert set(state.members) == {"m"}
    assert decide(state, host_membership.HostLost("b", "again"))[1] == ()


def test_two_that_cannot_reach_each_other_part() -> None:
    """The second time without a step in between; the master stays, whoever complains."""
    for who, whom in (("m", "b"), ("b", "m")):
        state, _ = run(*BOTH)
        state, first, _ = decide(
            state, host_membership.ExchangeFailed(who, 2, whom, "no connection")
        )
        assert first == (PauseHosts(3),)
        moved, _, _ = decide(state, host_membership.StepsCommitted())
        _, (gone, hold), _ = decide(
            state, host_membership.ExchangeFailed(who, 3, whom, "no connection")
        )
        assert hold == PauseHosts(4)
        assert isinstance(gone, host_membership.AbandonHost)
        assert gone.name == "b"
        assert decide(moved, host_membership.ExchangeFailed(who, 3, whom, "no connection"))[1] == (
            PauseHosts(4),
        )


EVENTS = st.one_of(
    st.builds(host_membership.HostReady, st.sampled_from("bcd"), st.integers(1, 3)),
    st.builds(
        host_membership.HostPaused,
        st.sampled_from("mbcd"),
        st.integers(1, 9),
        st.builds(
            HostStatus,
            whole=st.one_of(st.none(), st.integers(4, 5)),
            base=st.one_of(st.none(), st.integers(1, 4)),
        ),
    ),
    st.builds(host_membership.HostLost, st.sampled_from("bcd"), st.just("gone")),
    st.builds(
        host_membership.ExchangeFailed,
        st.sampled_from("mbcd"),
        st.integers(1, 9),
        st.sampled_from(["", "m", "b", "c", "d"]),
        st.just("trouble"),
    ),
    st.just(host_membership.StepsCommitted()),
)


@given(st.lists(EVENTS, max_size=30))
def test_whatever_happens_the_fleet_is_valid(events: Sequence[host_membership.Event]) -> None:
    state, _, _ = decide(HostMembership(master="m"), host_membership.HostReady("m", 1))
    state, _, _ = decide(state, host_membership.HostPaused("m", 1, standing(4)))
    for event in events:
        before = state
        if isinstance(event, host_membership.HostPaused) and event.name == "m":
            event = host_membership.HostPaused(
                "m", event.generation, standing(4)
            )  # it always has a state
        state, commands, reason = decide(state, event)
        assert reason
        assert "m" in state.members, "the master is never given up"
        assert state.generation >= before.generation
        for command in commands:
            if isinstance(command, ResumeHosts):
                assert command.workers.keys() == state.members.keys() == command.actions.keys()
                assert command.actions[command.source] != "copy"
                assert command.generation == state.generation
            if isinstance(command, PauseHosts):
                assert command.generation == state.generation > before.generation
                assert state.regrouping
        if state.generation > before.generation:
            assert all(member.standing is None for member in state.members.values())


def test_the_sum_over_hosts_has_the_bits_of_one() -> None:
    """What the tree says, done on numbers: floating-point sums depend on their order."""
    torch.manual_seed(0)
    leaves = [torch.randn(()) * 10.0**k for k in torch.randint(-4, 4, (12,)).tolist()]

    def total(node: Node) -> torch.Tensor:
        return leaves[node] if isinstance(node, int) else total(node[0]) + total(node[1])

    whole = tree((True,) * 12)
    assert whole is not None
    for counts in ({"a": 1, "b": 2}, {"a": 3, "b": 1, "c": 1}, {"a": 5, "b": 7}):
        trees = ShardPlacement.of(12, counts).subtrees
        sums = {}
        for each in trees:
            node = tree(tuple(shard in each for shard in range(12)))
            assert node is not None
            sums[each.start] = total(node)
        outer = tree(tuple(shard in sums for shard in range(12)))
        assert outer is not None
        kept, leaves = leaves, [sums.get(shard, leaves[shard]) for shard in range(12)]
        found = total(outer)
        leaves = kept
        assert torch.equal(found, total(whole))


@pytest.mark.parametrize("closed", [True, False])
def test_who_is_gone_is_not_dropped(closed: bool) -> None:
    """Another agent may have connected under its name before its loss is decided on."""
    _, said = run(
        host_membership.HostReady("m", 1),
        host_membership.HostReady("b", 1),
        host_membership.HostLost("b", "why", closed),
    )
    assert host_membership.AbandonHost("b", "why", drop=not closed) in said
