"""Recovery's rules: where to go on, who has stalled, how long to wait; and a simulated host."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.agent.membership import Status, TargetChanged
from lockstep.agent.recovery import Resumption, resume, step_in_flight
from lockstep.agent.stall_policy import StallTimeout, stalled
from lockstep.planning.step_phases import Phase, progress_of
from tests.support.simulated_host import Simulation

S, C, R, N, U = Phase.STARTED, Phase.COMPUTED, Phase.REDUCED, Phase.NORMED, Phase.UPDATED


def words(*reached: tuple[int, Phase]) -> list[int]:
    return [progress_of(step, phase) for step, phase in reached]


# Which step is in flight.


@pytest.mark.parametrize(
    ("reached", "step"),
    [
        ([(0, S)], 0),
        ([(7, S), (7, S)], 7),
        ([(7, C), (7, S)], 7),
        ([(7, U), (7, N)], 7),
        ([(7, U), (7, C)], 7),
        ([(7, U), (7, U)], 8),
        ([(7, U), (8, S)], 8),
        ([(8, C), (7, U)], 8),
        ([(8, C), (8, S), (7, U)], 8),
    ],
)
def test_a_step_is_committed_when_all_have_updated(
    reached: list[tuple[int, Phase]], step: int
) -> None:
    assert step_in_flight(words(*reached)) == step


def test_open_shards_are_shared_out() -> None:
    done = [7, 6, 7, 6, 6, 6, 7]
    found = resume(words((7, C), (7, S)), [6, 6], done, snapshot_step=5, workers=3)
    assert found == Resumption(step=7, back=None, todo=((1,), (3,), (4, 5)))


def test_a_torn_state_goes_back_to_the_base() -> None:
    found = resume(words((7, U), (7, C)), [7, 6], [7, 7, 7], snapshot_step=5, workers=2)
    assert found == Resumption(step=5, back=2, todo=((0,), (1, 2)))


def test_gradients_are_kept_where_the_snapshot_is_of_the_same_step() -> None:
    found = resume(words((7, C), (7, C)), [6, 7], [7, 7], snapshot_step=7, workers=1)
    assert found == Resumption(step=7, back=0, todo=((),))


def test_all_gradients_and_no_update_yet() -> None:
    found = resume(words((7, C), (7, C)), [6, 6], [7, 7], snapshot_step=3, workers=1)
    assert found == Resumption(step=7, back=None, todo=((),))


def test_committed_though_nobody_could_go_on() -> None:
    found = resume(words((7, U), (7, U)), [7, 7], [7, 7], snapshot_step=3, workers=1)
    assert found == Resumption(step=8, back=None, todo=((0, 1),))


def test_more_workers_than_open_shards() -> None:
    found = resume(words((3, S)), [2], [3, 2, 3], snapshot_step=3, workers=3)
    assert sorted(map(len, found.todo)) == [0, 0, 1]


@given(
    st.integers(0, 50),
    st.lists(st.booleans(), min_size=1, max_size=20),
    st.integers(1, 8),
)
def test_every_open_shard_is_given_out_once(step: int, done: list[bool], workers: int) -> None:
    shard_done = [step - (not d) for d in done]
    found = resume(words((step, S)), [step - 1], shard_done, snapshot_step=0, workers=workers)
    given_out = sorted(shard for part in found.todo for shard in part)
    assert given_out == [shard for shard, d in enumerate(done) if not d]
    assert max(map(len, found.todo)) - min(map(len, found.todo)) <= 1


# Stalls.


def test_those_who_wait_for_others_have_not_stalled() -> None:
    behind, reason = stalled(words((5, C), (5, S), (5, S)), [9.0, 9.0, 0.1], [2.0] * 3)
    assert behind == [1]
    assert "2.0 s" in reason


def test_everybody_moves() -> None:
    found = stalled(words((5, C), (5, S)), [9.0, 1.0], [2.0, 2.0])
    assert found == ([], "everybody moves")


def test_all_have_stalled() -> None:
    assert stalled(words((5, S), (5, S)), [3.0, 3.0], [2.0, 2.0])[0] == [0, 1]


def test_each_has_its_own_limit() -> None:
    assert stalled(words((5, S), (5, S)), [3.0, 3.0], [30.0, 2.0])[0] == [1]


def learned(*steps: float) -> StallTimeout:
    patience = StallTimeout(None)
    for seconds in steps:
        patience.step_took(seconds)
    return patience


def test_patience_is_longer_than_any_step() -> None:
    assert learned().limit() == StallTimeout.FIRST
    assert learned(0.0, 0.9, 0.3).limit() == StallTimeout.LEAST
    assert learned(0.0, 0.9, 7.0).limit() == pytest.approx(70.0)


def test_patience_with_what_has_not_been_done_before() -> None:
    assert learned(*[0.001] * 10).limit(first=True) == StallTimeout.FIRST


def test_no_patience_with_a_stopped_process() -> None:
    assert learned().limit(stopped=True) == StallTimeout.STOPPED
    assert learned(60.0, 60.0, 60.0).limit(stopped=True) == StallTimeout.STOPPED


def test_the_stall_timeout_learns_from_pauses_that_ended() -> None:
    """Data that took a minute once may do so again."""
    patience = learned(*[0.001] * 10)
    patience.silence_ended(60.0)
    assert patience.limit() == pytest.approx(180.0)


def test_patience_grows_with_those_given_up_on() -> None:
    """A slow shard that was taken for a stall is given time enough before it counts as poison."""
    patience = learned(*[0.001] * 10)
    limits = []
    for _ in range(3):
        limits.append(patience.limit())
        patience.given_up += 1
    assert limits == [30.0, 60.0, 120.0]
    patience.step_took(0.001)
    assert patience.limit() == 30.0


def test_patience_as_it_is_set() -> None:
    patience = StallTimeout(0.5)
    assert patience.limit() == patience.limit(stopped=True) == patience.limit(first=True) == 0.5
    patience.step_took(100.0)
    assert patience.limit() == 0.5


# A simulated host.


def play(world: Simulation, dice: random.Random, deaths: int) -> None:
    """Let workers and the master act in a random order, and workers die anywhere."""
    for _ in range(dice.randrange(300)):
        worker_ids = sorted(world.processes)
        worker_id = dice.choice(worker_ids)
        writes = dice.choice((0, 1, 2, 3, 5, 8, 13))
        while writes and world.move(worker_id):
            writes -= 1
        starting = world.members.status.get(worker_id) is Status.STARTING
        if dice.random() < 0.04 and world.deaths < deaths and not starting:
            world.kill(worker_id)
        if dice.random() < 0.8:
            world.hear(dice.choice(worker_ids))
        if dice.random() < 0.02:
            world.decide(TargetChanged(dice.randint(1, world.members.max_workers)))
        if dice.random() < 0.3:
            world.tick()
        if dice.random() < 0.1:
            dice.choice((world.checkpoint, world.checkpoint, world.end_checkpoint))()


def finish(world: Simulation) -> None:
    """Everybody goes on, in turn, until the job is done."""
    for _ in range(20_000):
        if world.finished:
            return
        for worker_id in sorted(world.processes):
            world.move(worker_id)
        for worker_id in sorted(world.processes):
            world.hear(worker_id)
        world.tick()
    raise AssertionError(f"no end: {world.members}")


@settings(max_examples=500)
@given(st.integers(0, 2**32))
def test_every_block_is_updated_once_by_every_step(seed: int) -> None:
    """Whoever dies between whichever two writes; and no more is redone than has to be."""
    dice = random.Random(seed)
    shards = dice.randint(1, 6)
    max_workers = dice.randint(min(2, shards), shards)
    world = Simulation(
        shards=shards,
        blocks=[dice.choice((1, 4, 6)) for _ in range(dice.randint(1, 6))],
        workers=dice.randint(1, max_workers),
        max_workers=max_workers,
        steps=5,
        clip=dice.random() < 0.3,
        every=dice.randint(1, 3),
    )
    try:
        play(world, dice, deaths=6)
        world.end_checkpoint()
        finish(world)
        world.check_committed(5)
        assert sorted(world.computed) == [0, 1, 2, 3, 4]
        for count in world.computed.values():
            assert shards <= count <= shards * (1 + world.times_back) + world.deaths
    finally:
        world.close()


# Workers with homes of their own: the mirror is whole, or the snapshot is.


@pytest.mark.parametrize(
    ("reached", "updating", "mirror", "step", "back"),
    [
        ([(7, C), (7, S)], [6, 6], 7, 7, None),
        ([(7, C), (7, S)], [6, 6], 4, 4, 3),
        ([(7, U), (7, C)], [7, 6], 7, 4, 3),  # it had been whole, and is being overwritten
        ([(7, U), (7, C)], [7, 7], 8, 4, 3),  # rank 0 was ready, and not all others
        ([(7, U), (7, U)], [7, 7], 8, 8, None),
        ([(7, U), (7, U)], [7, 7], 4, 4, 4),
    ],
)
def test_homes_go_back_unless_the_mirror_is_whole(
    reached: list[tuple[int, Phase]], updating: list[int], mirror: int, step: int, back: int | None
) -> None:
    """And all shards are computed anew: what was in a dead worker's home is gone."""
    found = resume(words(*reached), updating, [7, 7, 8], 4, 2, mirror_step=mirror)
    assert found == Resumption(step=step, back=back, todo=((0, 1), (2,)))


class Homes:
    """Workers that do as `worker.home_moves` does, one small act at a time, until all are killed.

    Each keeps its part of the state in its home: the number of steps that it has made.
    """

    def __init__(self, workers: int, due: set[int]) -> None:
        self.due, self.homes = due, [0] * workers
        self.mirror, self.snapshot = [0] * workers, [0] * workers
        self.mirror_step = self.snapshot_step = 0
        self.words = [progress_of(0, S)] * workers
        self.updating = [-1] * workers
        self.acts = [self.live(rank) for rank in range(workers)]

    def all_at(self, word: int) -> bool:
        return min(self.words) >= word

    def live(self, rank: int) -> Iterator[None]:
        for step in itertools.count():
            self.words[rank] = progress_of(step, C)
            while not self.all_at(progress_of(step, C)):
                yield
            self.updating[rank] = step
            yield
            self.homes[rank] = step + 1
            if step in self.due:
                self.mirror[rank] = step + 1
                yield
                if rank == 0:
                    self.mirror_step = step + 1
                    yield
            self.words[rank] = progress_of(step, U)
            while not self.all_at(progress_of(step, U)):
                yield
            if step in self.due:
                self.snapshot[rank] = self.mirror[rank]
                yield
                if rank == 0:
                    self.snapshot_step = step + 1
                    yield


@given(st.integers(1, 4), st.sets(st.integers(0, 6)), st.lists(st.integers(0, 3), max_size=120))
def test_whenever_all_are_killed_one_of_the_two_is_whole(
    workers: int, due: set[int], order: list[int]
) -> None:
    """What recovery chooses has the parts of all workers, after the very steps that it says."""
    homes = Homes(workers, due)
    for rank in order:
        next(homes.acts[rank % workers])
    found = resume(
        homes.words, homes.updating, [-1], homes.snapshot_step, 1, mirror_step=homes.mirror_step
    )
    state = homes.mirror if found.back is None else homes.snapshot
    assert state == [found.step] * workers
