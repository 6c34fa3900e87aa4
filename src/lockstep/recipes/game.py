"""Recipe `game`: Connect Four by self-play.

Each shard plays games of its own with the committed parameters, both sides with a tree search, and
trains on them once: on the policies of the search and the outcomes of the games. The games are
seeded from (seed, step, shard), so they are the same on any worker; none is kept for a later step.
The rules are OpenSpiel's. `docs/applications.md` reports strength and times; `lockstep play RUN`
plays against the network.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

from lockstep.job.job import Job
from lockstep.job.task import Parameters, Task
from lockstep.recipes import at_least
from lockstep.recipes.connect_four.network import Net, evaluator, likeliest
from lockstep.recipes.connect_four.opponents import OPPONENTS, Match, play, scripted
from lockstep.recipes.connect_four.rules import new_game
from lockstep.recipes.connect_four.self_play import self_play

GAMES, STEPS = 32, 100
"""Games per step over all shards, and steps between two evaluations."""
OPENING, TRUST = 8, 0.5
"""Arguments of `self_play`."""
MATCHES = 200
"""Held-out games against each opponent; in half of them the network moves second."""
RATE, WARM_UP = 3e-3, 20
"""The highest learning rate, and the steps in which it is reached."""


def game(epochs: float = 20, simulations: int = 16, width: int = 64) -> Job:
    """Learn to play Connect Four.

    Args:
        epochs: Rounds of 100 steps, 3,200 games; the learning rate falls to 0 by their end.
        simulations: Positions that each search evaluates.
        width: Channels of the network.

    Raises:
        DataError: OpenSpiel is not installed.
    """
    at_least(1, simulations=simulations, width=width)
    new_game()  # so that a missing package is reported before the run
    return Job(
        task=Game(epochs, simulations, width), data_epochs=epochs, batch_size=GAMES,
        eval_batch_size=50,
    )  # fmt: skip


class Game(Task):
    """Task of the recipe `game`."""

    def __init__(self, epochs: float = 20, simulations: int = 16, width: int = 64) -> None:
        self.epochs, self.simulations, self.width = epochs, simulations, width

    def model(self) -> nn.Module:
        """A fresh network."""
        return Net(self.width)

    def train_data(self) -> TensorDataset:
        """A number for each game until the next evaluation."""
        return TensorDataset(torch.arange(GAMES * STEPS))

    def eval_data(self) -> TensorDataset:
        """`(opponent, whether it begins, seed)` of each held-out game."""
        games = torch.arange(len(OPPONENTS) * MATCHES)
        return TensorDataset(games // MATCHES, games % 2, games)

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Play a game for each sample. The loss is the mean over games, and over the positions of
        each, of the policy's cross-entropy plus the value's squared error."""
        learned = self_play(
            len(batch[0]), evaluator(model),
            simulations=self.simulations, opening=OPENING, trust=TRUST,
        )  # fmt: skip
        logits, values = model(learned.boards)
        policy = -(learned.policies * logits.log_softmax(dim=1)).sum(dim=1)
        value = F.mse_loss(values, learned.values, reduction="none")
        return torch.dot(learned.weights, policy + value)

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(params, lr=RATE, weight_decay=1e-4)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """Linear warm-up, then linear decay to 0."""
        steps = max(1, self.epochs * STEPS)
        return LambdaLR(
            optimizer, lambda step: max(0.0, min((step + 1) / WARM_UP, 1 - step / steps))
        )

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | float]:
        """None; see `score`."""
        return {}

    def outputs(self, model: nn.Module, batch: Any) -> dict[str, Any]:
        """Per held-out game, `[n]`: the opponent, and the outcome for the network's policy, which
        plays without a search."""
        network = evaluator(model)
        return {
            "opponent": batch[0],
            "worth": torch.tensor(play(matches(batch), likeliest(network))),
        }

    def score(self, outputs: dict[str, Any]) -> dict[str, float]:
        """The fraction of games won against each opponent; a draw is not won."""
        return wins(outputs["opponent"], outputs["worth"])

    def baseline(self) -> dict[str, float]:
        """The fraction of the same games that the player `one_ply` wins."""
        batch, draw = self.eval_data().tensors, random.Random(0)
        worth = play(
            matches(batch), lambda states: [scripted(state, "one_ply", draw) for state in states]
        )
        return wins(batch[0], torch.tensor(worth))


def matches(batch: Sequence[torch.Tensor]) -> list[Match]:
    """The matches of a batch of held-out samples."""
    return [
        Match(opponent=OPPONENTS[opponent], first=bool(first), seed=seed)
        for opponent, first, seed in zip(*(column.tolist() for column in batch), strict=True)
    ]


def wins(opponents: torch.Tensor, worth: torch.Tensor) -> dict[str, float]:
    """The fraction of games won against each opponent, from `[n]` and `[n]`."""
    return {
        f"wins_{name}": (worth[opponents == index] > 0).double().mean().item()
        for index, name in enumerate(OPPONENTS)
    }
