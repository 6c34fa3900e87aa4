"""The recipes game and cartpole, small."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

import lockstep
from lockstep import recipes
from lockstep.errors import DataError, JobError
from lockstep.job.faults import Fault
from lockstep.recipes.cartpole import (
    CARTS,
    DISCOUNT,
    LENGTH,
    PASSES,
    STEPS,
    TRACE,
    Actor,
    CartPole,
    advantages,
    episodes,
    roll_out,
)  # fmt: skip
from lockstep.recipes.connect_four import terminal
from lockstep.recipes.connect_four.network import Net, evaluator
from lockstep.recipes.connect_four.opponents import OPPONENTS
from lockstep.recipes.connect_four.self_play import self_play
from lockstep.recipes.game import MATCHES, OPENING, TRUST, Game, game
from lockstep.results.result import Result
from lockstep.system.seeding import seed_everything
from tests.support import command
from tests.support.harmed_runs import assert_same, assert_struck

SMALL: dict[str, dict[str, Any]] = {
    "game": {"args": {"simulations": 4, "width": 8}, "batch_size": 7},
    "cartpole": {"args": {}, "batch_size": 500, "checkpoint_steps": 3},
}
"""Steps of them take a fraction of a second; seven games are no three equal shards."""
KILLED = (Fault(worker_id=1, step=3, phase="backward"),)

Runs = Callable[[str], Result]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Undisturbed runs on one worker, made when they are first asked for."""
    made: dict[str, Result] = {}

    def get(name: str) -> Result:
        if name not in made:
            made[name] = run(name, tmp_path_factory.mktemp(name), workers=1)
        return made[name]

    return get


def run(name: str, folder: Path, **settings: Any) -> Result:
    """Six steps of a recipe in three shards."""
    settings = {"steps": 6, "shards": 3, "threads": 1, **SMALL[name], **settings}
    return lockstep.run(name, out=str(folder / "run"), quiet=True, **settings)


@pytest.mark.parametrize("name", SMALL)
def test_the_same_bits(name: str, runs: Runs, tmp_path: Path) -> None:
    """On one worker, on two, and on three of which one is killed."""
    whole, two = runs(name), run(name, tmp_path / "2", workers=2)
    assert_same(two, whole)
    harmed = run(name, tmp_path / "3", workers=3, faults=KILLED)
    assert_struck(harmed.folder, KILLED)
    assert_same(harmed, whole)
    assert harmed.baseline == two.baseline == whole.baseline
    assert whole.baseline.keys() < whole.metrics.keys()


# game


def test_every_held_out_game_counts_once(runs: Runs) -> None:
    result, task = runs("game"), Game(simulations=4, width=8)
    model, data = result.model(), task.eval_data()
    opponents, first, seeds = data.tensors
    for index in range(len(OPPONENTS)):
        assert (opponents == index).sum() == MATCHES == 2 * first[opponents == index].sum()
    assert len(set(seeds.tolist())) == len(OPPONENTS) * MATCHES
    batches = DataLoader(data, game().eval_batch_size)
    with torch.no_grad():
        parts = [task.outputs(model, batch) for batch in batches]
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    assert len(joined["worth"]) == len(OPPONENTS) * MATCHES
    wanted = task.score(joined)
    assert {name: result.metrics[name] for name in wanted} == wanted
    for index, name in enumerate(OPPONENTS):
        won = sum(worth > 0 for worth in joined["worth"][opponents == index].tolist())
        assert result.metrics[f"wins_{name}"] == won / MATCHES


def test_the_loss_is_a_mean_over_games() -> None:
    """So that shards of any sizes are weighted rightly: in each game a mean over its positions."""
    task = Game(simulations=4, width=8)
    torch.manual_seed(0)
    model = task.model()
    assert isinstance(model, Net)
    nn.init.normal_(model.head.weight)  # it begins as 0
    seed_everything(7)
    found = task.loss(model, [torch.arange(3)])
    seed_everything(7)
    learned = self_play(3, evaluator(model), simulations=4, opening=OPENING, trust=TRUST)
    logits, values = model(learned.boards)
    games: dict[float, list[float]] = {}
    for row, value, policy, wanted, weight in zip(
        logits.softmax(dim=1), values, learned.policies, learned.values, learned.weights,
        strict=True,
    ):  # fmt: skip
        loss = -(policy * row.log()).sum() + (value - wanted) ** 2
        games.setdefault(weight.item(), []).append(loss.item())
    assert len(games) == 3  # of three lengths
    mean = sum(sum(losses) / len(losses) for losses in games.values()) / 3
    assert found.item() == pytest.approx(mean, rel=1e-4)


def test_playing_on_the_command_line(runs: Runs, tmp_path: Path) -> None:
    folder = str(runs("game").folder)
    ended = command.python("-m", "lockstep", "play", folder, cwd=tmp_path, script="4\n9\n4\n")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("The network plays") == 2
    assert "'9' is no move" in ended.stdout
    assert ended.stdout.splitlines()[-1] == "You have left the game."


def test_a_trained_network_against_itself(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs("game").folder
    terminal.start(folder, second=False, itself=True, simulations=4)
    first = capsys.readouterr().out
    assert "moves: " in first
    terminal.start(folder, second=False, itself=True, simulations=4)
    assert capsys.readouterr().out == first


def test_a_run_that_has_not_learned_to_play(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"found: +cartpole"):
        terminal.network_of(runs("cartpole").folder)


# cartpole


def test_advantages_are_discounted_sums_of_surprises() -> None:
    torch.manual_seed(0)
    rewards, values, after = torch.rand(3, 6, 2)
    fallen, ended = torch.zeros(2, 6, 2)
    fallen[2, 0] = ended[2, 0] = 1  # a pole that fell
    ended[3, 1] = 1  # an episode that was over because of the time
    found = advantages(rewards, values, after, fallen, ended)
    for cart in range(2):
        for move in range(6):
            wanted, weight = 0.0, 1.0
            for later in range(move, 6):
                worth = 0.0 if fallen[later, cart] else after[later, cart].item()
                surprise = rewards[later, cart] + DISCOUNT * worth - values[later, cart]
                wanted += weight * surprise.item()
                weight *= DISCOUNT * TRACE
                if ended[later, cart]:
                    break
            assert found[move, cart].item() == pytest.approx(wanted, abs=1e-5)


def test_a_rollout_is_a_function_of_its_parameters() -> None:
    torch.manual_seed(1)
    old = parameters_to_vector(Actor().parameters()).detach()
    torch.manual_seed(2)
    one = roll_out(old)
    torch.manual_seed(3)
    two, other = roll_out(old), roll_out(old + 1e-6)
    for name in ("seen", "actions", "log_probabilities", "advantages", "returns"):
        assert getattr(one, name).equal(getattr(two, name)), name
        assert len(getattr(one, name)) == CARTS * LENGTH
    assert not one.seen.equal(other.seen)
    assert one.advantages.mean().abs() < 1e-5
    assert one.advantages.std() == pytest.approx(1)


def test_a_worker_that_comes_later_finds_the_same_rollout() -> None:
    """In the middle of an iteration, and with other parameters than made the rollout."""
    torch.manual_seed(0)
    task, model = CartPole(), Actor()
    batch = [torch.arange(0, 4000, 10)]
    first = task.loss(model, batch)
    assert model.old.equal(model.flat())
    assert model.clock == 1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    kept = [buffer.clone() for buffer in model.buffers()]
    here = task.loss(model, batch)
    for buffer, value in zip(model.buffers(), kept, strict=True):
        buffer.copy_(value)
    assert CartPole().loss(model, batch).equal(here)
    assert not here.equal(first)
    assert not model.old.equal(model.flat())
    model.clock.fill_(STEPS)
    task.loss(model, batch)
    assert model.old.equal(model.flat())


def test_replayed_from_the_middle_of_an_iteration(runs: Runs) -> None:
    """By workers that have not seen its beginning."""
    found = lockstep.verify(runs("cartpole").folder, steps=(3, 6), workers=2)
    assert (found.first, found.last, found.final) == (3, 6, True)
    assert "step-00000003" in found.start


def test_an_iteration_is_a_data_epoch() -> None:
    (numbers,) = CartPole().train_data().tensors
    assert torch.bincount(numbers).tolist() == [PASSES] * (CARTS * LENGTH)


def test_cartpole_learns() -> None:
    torch.manual_seed(0)
    task, model = CartPole(iterations=10), Actor()
    optimizer = task.optimizer(lockstep.Parameters(model.named_parameters()))
    for _ in range(3):
        for (numbers,) in torch.randperm(PASSES * CARTS * LENGTH).view(STEPS, 1, -1):
            loss = task.loss(model, [numbers % (CARTS * LENGTH)])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = torch.as_tensor(task.metrics(model, [torch.arange(20)])["return"])
    assert found.mean() > 2 * task.baseline()["return"]


def test_an_episode_depends_on_its_seed_alone() -> None:
    def lean(seen: torch.Tensor) -> torch.Tensor:
        return (seen[:, 2] > 0).long()

    together = episodes(lean, range(5, 25))
    assert together.tolist() == [episodes(lean, [seed]).item() for seed in range(5, 25)]
    assert len(set(together.tolist())) > 5


# Both


@pytest.mark.parametrize(("name", "package"), [("game", "pyspiel"), ("cartpole", "gymnasium")])
def test_the_extra_is_missing(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is started."""
    monkeypatch.setitem(sys.modules, package, None)  # as Python has it for what cannot be imported
    with pytest.raises(DataError, match=r"pip install 'lockstep-dlp\[games\]'"):
        recipes.find(name)()


BARS: dict[str, dict[str, float]] = {
    "game": {"wins_random": 0.95, "wins_one_ply": 0.70},
    "cartpole": {"return": 475},
}


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", BARS)
def test_defaults_reach_what_the_recipe_promises(name: str, run_folder: str) -> None:
    result = lockstep.run(name, workers=2, shards=2, threads=1, out=run_folder, quiet=True)
    for metric, bar in BARS[name].items():
        assert result.metrics[metric] >= bar
        assert result.metrics[metric] > result.baseline[metric]
