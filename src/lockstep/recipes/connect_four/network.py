"""Network: policy and value of Connect Four states, and the player that follows the policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lockstep.recipes.connect_four.opponents import Choose
from lockstep.recipes.connect_four.rules import COLUMNS, State, planes
from lockstep.recipes.connect_four.tree_search import Evaluate


class Net(nn.Module):
    """Network: policy and value of boards. The first layer sees the twelve windows of 4 by 4, since
    any four in a row lie in one of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, width, 4), nn.ReLU(), nn.Conv2d(width, width, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(12 * width, 2 * width), nn.ReLU(),
            nn.Linear(2 * width, 2 * width), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(2 * width, COLUMNS + 1)
        nn.init.zeros_(self.head.weight)

    def forward(self, boards: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Boards `[n, 2, 6, 7]`, as `planes` has them, to logits `[n, 7]` and values `[n]`.

        A value is the expected outcome for the player to move, from -1 to 1.
        """
        out = self.head(self.body(boards))
        return out[:, :COLUMNS], out[:, COLUMNS].tanh()


def evaluator(model: nn.Module) -> Evaluate:
    """The network as the function that `search` takes."""

    def evaluate(states: Sequence[State]) -> tuple[list[list[float]], list[float]]:
        with torch.no_grad():
            logits, values = model(planes(states))
        return logits.tolist(), values.tolist()

    return evaluate


def likeliest(network: Evaluate) -> Choose:
    """The player that takes the likeliest free column of the policy, without a search."""

    def choose(states: Sequence[State]) -> list[int]:
        logits, _ = network(states)
        return [
            max(state.legal_actions(), key=row.__getitem__)
            for state, row in zip(states, logits, strict=True)
        ]

    return choose
