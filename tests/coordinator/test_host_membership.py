"""Host membership: who takes part, and from which state a new generation continues."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockstep.agent.regroup_messages import HostStatus
from lockstep.coordinator import host_membership as host_membership
from lockstep.coordinator.host_membership import (
    HostMembership,
    PauseHosts,
    ResumeHosts,
    decide,
    settle,
    settle_parts,
)


def host_status(whole: int | None, snapshot: int | None = None) -> HostStatus:
    return HostStatus(whole=whole, snapshot=snapshot)


@pytest.mark.parametrize(
    ("statuses", "step", "source", "actions"),
    [
        ({"m": host_status(5), "b": host_status(5)}, 5, "m", {"m": "keep", "b": "keep"}),
        ({"m": host_status(5), "b": host_status(6)}, 6, "b", {"m": "copy", "b": "keep"}),
        ({"m": host_status(None, 3), "b": host_status(6)}, 6, "b", {"m": "copy", "b": "keep"}),
        ({"m": host_status(6), "b": host_status(None, 6)}, 6, "m", {"m": "keep", "b": "back"}),
        (
            {"m": host_status(None, 3), "b": host_status(None, 3)},
            3,
            "m",
            {"m": "back", "b": "back"},
        ),
        (
            {"m": host_status(None, 3), "b": host_status(None, 4)},
            4,
            "b",
            {"m": "copy", "b": "back"},
        ),
        ({"m": host_status(7), "new": host_status(None)}, 7, "m", {"m": "keep", "new": "copy"}),
    ],
)
def test_the_newest_whole_state_counts(
    statuses: dict[str, HostStatus], step: int, source: str, actions: dict[str, str]
) -> None:
    assert settle(statuses, "m") == (step, source, actions)


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
    found = settle_parts({n: host_status(s, 2) for n, s in steps.items()}, "m", frozenset(before))
    assert found == (wanted[0], "m", wanted[1])


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
    state, said = run(*BOTH, host_membership.HostPaused("m", 2, host_status(0)))
    assert said == [PauseHosts(1), PauseHosts(2)]
    state, (order,), _ = decide(state, host_membership.HostPaused("b", 2, host_status(None)))
    assert isinstance(order, ResumeHosts)
    assert (order.workers, order.source) == ({"m": 1, "b": 2}, "m")
    assert order.actions == {"m": "keep", "b": "copy"}
    assert not state.regrouping


def test_what_is_said_of_an_earlier_generation_is_not_heard() -> None:
    state, _ = run(*BOTH)
    for event in (
        host_membership.HostPaused("b", 1, host_status(9)),
        host_membership.ExchangeFailed("b", 1, "m", "old"),
    ):
        assert decide(state, event)[:2] == (state, ())


def test_a_loss_begins_another_generation() -> None:
    state, _ = run(
        *BOTH,
        host_membership.HostPaused("m", 2, host_status(0)),
        host_membership.HostPaused("b", 2, host_status(0)),
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


def failing(name: str, generation: int, peer: str, *awaited: str) -> host_membership.Event:
    return host_membership.ExchangeFailed(name, generation, peer, "?", frozenset(awaited))


def of_four() -> HostMembership:
    """Four hosts that have been told to go on, in generation 4."""
    names = "mbcd"
    state, _ = run(
        *(host_membership.HostReady(name, 1) for name in names),
        *(host_membership.HostPaused(name, 4, host_status(3)) for name in names),
    )
    assert (state.generation, state.began) == (4, 4)
    return state


def lost(state: HostMembership, events: Sequence[host_membership.Event]) -> list[str]:
    """The hosts that are given up for these events; all rest again after each of them."""
    gone = []
    for event in events:
        state, commands, _ = decide(state, event)
        gone += [each.name for each in commands if isinstance(each, host_membership.AbandonHost)]
        for name in [*state.members] if commands else ():
            paused = host_membership.HostPaused(name, state.generation, host_status(3))
            state, _, _ = decide(state, paused)
    return gone


@pytest.mark.parametrize(
    ("events", "gone"),
    [
        # d has bad links, and complains of all others; they do as well, or not.
        ([failing("d", 4, "b"), failing("d", 5, "c")], ["d"]),
        ([failing("d", 4, "m"), failing("d", 5, "b")], ["d"]),
        ([failing("d", 4, "b"), failing("d", 5, "b")], ["d"]),
        ([failing("d", 4, "b"), failing("c", 5, "d")], ["d"]),
        # b is mute: others complain of it, and the master waits for it, too.
        ([failing("c", 4, "b", "b"), failing("d", 5, "b", "b")], ["b"]),
        ([failing("c", 4, "b", "b"), failing("c", 5, "b", "b")], ["b"]),
        ([failing("m", 4, "b"), failing("m", 5, "b")], ["b"]),
        ([failing("b", 4, "m"), failing("b", 5, "m")], ["b"]),
        # Its own exchange fails again and again; it names nobody, or nobody that there is.
        ([failing("b", 4, ""), failing("b", 5, "nobody")], ["b"]),
        # Once is not too often; nor are two pairs that have nothing in common.
        ([failing("d", 4, "b")], []),
        ([failing("d", 4, "b"), failing("c", 5, "m")], []),
        ([failing("d", 4, "b"), host_membership.StepsCommitted(), failing("d", 5, "b")], []),
    ],
)
def test_who_is_in_most_pairs_is_given_up(
    events: Sequence[host_membership.Event], gone: list[str]
) -> None:
    assert lost(of_four(), events) == gone


def test_what_others_say_of_the_same_generation_counts() -> None:
    """They were called to rest by the first complaint, which names the wrong host."""
    state = of_four()
    for event in (failing("d", 4, "b"), failing("c", 4, "d"), failing("m", 4, "d")):
        state, _, _ = decide(state, event)
    assert state.generation == 5, "all of it is one regrouping"
    for name in "mbcd":
        state, _, _ = decide(state, host_membership.HostPaused(name, 5, host_status(3)))
    assert lost(state, [failing("d", 5, "b")]) == ["d"]


def test_nobody_gets_a_second_chance_when_the_run_is_to_stop() -> None:
    state, _, _ = decide(of_four(), host_membership.StopWanted())
    assert lost(state, [failing("m", 4, "b")]) == ["b"]


def test_a_master_that_cannot_exchange_ends_the_run() -> None:
    state = of_four()
    for generation in range(4, 9):
        state, commands, _ = decide(state, failing("m", generation, ""))
        for name in "mbcd":
            paused = host_membership.HostPaused(name, state.generation, host_status(3))
            state, _, _ = decide(state, paused)
    assert commands == (host_membership.GiveUp("?"),)


EVENTS = st.one_of(
    st.builds(host_membership.HostReady, st.sampled_from("bcd"), st.integers(1, 3)),
    st.builds(
        host_membership.HostPaused,
        st.sampled_from("mbcd"),
        st.integers(1, 9),
        st.builds(
            HostStatus,
            whole=st.one_of(st.none(), st.integers(4, 5)),
            snapshot=st.one_of(st.none(), st.integers(1, 4)),
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
    st.just(host_membership.StopWanted()),
)


@given(st.lists(EVENTS, max_size=30))
def test_whatever_happens_the_membership_is_valid(events: Sequence[host_membership.Event]) -> None:
    state, _, _ = decide(HostMembership(master="m"), host_membership.HostReady("m", 1))
    state, _, _ = decide(state, host_membership.HostPaused("m", 1, host_status(4)))
    for event in events:
        before = state
        if isinstance(event, host_membership.HostPaused) and event.name == "m":
            event = host_membership.HostPaused(
                "m", event.generation, host_status(4)
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
            assert all(member.status is None for member in state.members.values())


@pytest.mark.parametrize("closed", [True, False])
def test_who_is_gone_is_not_dropped(closed: bool) -> None:
    """Another agent may have connected under its name before its loss is decided on."""
    _, said = run(
        host_membership.HostReady("m", 1),
        host_membership.HostReady("b", 1),
        host_membership.HostLost("b", "why", closed),
    )
    assert host_membership.AbandonHost("b", "why", drop=not closed) in said
