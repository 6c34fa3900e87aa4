"""Recipe `cartpole`: a pole on a cart, by PPO (proximal policy optimisation, Schulman et al. 2017).

A data epoch is one iteration of PPO: a rollout, and `PASSES` passes over its transitions, whose
numbers are the samples. A buffer of the model holds the policy with which the iteration began, and
the rollout is a function of that policy alone. So every worker computes it once per iteration, and
a replacement computes the same. Workers share the optimization, not the rollout.
`docs/applications.md` reports the returns.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import TensorDataset

from lockstep.errors import DataError
from lockstep.job.job import Job
from lockstep.job.task import Parameters, Task
from lockstep.recipes import at_least

CARTS, LENGTH = 8, 512
"""Carts and moves of a rollout. An episode ends after 500 moves."""
PASSES = 8
MINIBATCH = 512
STEPS = CARTS * LENGTH * PASSES // MINIBATCH
"""Steps of an iteration; with another batch size than `MINIBATCH` their number stays the same."""
DISCOUNT, TRACE = 0.99, 0.95
"""Gamma, and the lambda of generalised advantage estimation (Schulman and others, 2016)."""
CLIP, ENTROPY = 0.2, 0.005
RATE = 2e-3
EPISODES, HELD_OUT = 100, 1_000_000
"""The number of held-out episodes, and the seed of the first."""

Policy = Callable[[torch.Tensor], torch.Tensor]
"""Observations `[n, 4]` to actions `[n]`: 0 pushes to the left, 1 to the right."""


def cartpole(iterations: int = 25) -> Job:
    """Learn to balance a pole.

    Args:
        iterations: Number of rollouts; the learning rate falls to 0 by their end.

    Raises:
        DataError: Gymnasium is not installed.
    """
    at_least(0, iterations=iterations)
    carts(1)  # so that a missing package is reported before the run
    return Job(
        task=CartPole(iterations), data_epochs=iterations, batch_size=MINIBATCH,
        eval_batch_size=25, clip_grad_norm=0.5,
    )  # fmt: skip


class Actor(nn.Module):
    """Actor and critic as separate networks, and the parameters that made the rollout."""

    old: torch.Tensor
    clock: torch.Tensor
    buffer_rules: ClassVar = {"old": "last", "clock": "last"}
    """All shards write the same values."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(
            nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)
        )
        self.value = nn.Sequential(
            nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
        )
        self.register_buffer("old", self.flat())
        self.register_buffer("clock", torch.tensor(0))

    def forward(self, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Observations `[..., 4]` to logits `[..., 2]` and values `[...]`."""
        return self.policy(seen), self.value(seen).squeeze(-1)

    def flat(self) -> torch.Tensor:
        """All parameters in one vector, without a graph."""
        return nn.utils.parameters_to_vector(self.parameters()).detach()

    def tick(self) -> None:
        """Count a step; at the first of an iteration, copy the parameters to `old`."""
        if self.clock % STEPS == 0:
            self.old.copy_(self.flat())
        self.clock += 1


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Rollout: `CARTS * LENGTH` transitions, and the parameters that made them."""

    made_by: torch.Tensor
    seen: torch.Tensor
    """`[n, 4]`."""
    actions: torch.Tensor
    """`[n]`, int64."""
    log_probabilities: torch.Tensor
    """`[n]`: the log-probabilities of the actions."""
    advantages: torch.Tensor
    """`[n]`, with mean 0 and standard deviation 1."""
    returns: torch.Tensor
    """`[n]`: the targets of the value."""


class CartPole(Task):
    """Task of the recipe `cartpole`."""

    def __init__(self, iterations: int = 25) -> None:
        self.iterations = iterations
        self._last: Rollout | None = None

    def model(self) -> nn.Module:
        """A fresh actor."""
        return Actor()

    def train_data(self) -> TensorDataset:
        """The numbers of an iteration's transitions, each `PASSES` times."""
        return TensorDataset(torch.arange(CARTS * LENGTH).repeat(PASSES))

    def eval_data(self) -> TensorDataset:
        """The seeds of the held-out episodes."""
        return TensorDataset(torch.arange(HELD_OUT, HELD_OUT + EPISODES))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """PPO's clipped objective, the error of the value, and an entropy bonus."""
        assert isinstance(model, Actor)
        model.tick()
        past, chosen = self._rollout(model.old), batch[0]
        logits, values = model(past.seen[chosen])
        every = logits.log_softmax(dim=1)
        taken = every.gather(1, past.actions[chosen, None]).squeeze(1)
        ratio = (taken - past.log_probabilities[chosen]).exp()
        gain = past.advantages[chosen]
        clipped = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain)
        entropy = -(every.exp() * every).sum(dim=1)
        error = F.mse_loss(values, past.returns[chosen])
        total: torch.Tensor = 0.5 * error - clipped.mean() - ENTROPY * entropy.mean()
        return total

    def _rollout(self, old: torch.Tensor) -> Rollout:
        """The rollout of these parameters, kept until they change."""
        if self._last is None or not torch.equal(self._last.made_by, old):
            self._last = roll_out(old.clone())
        return self._last

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(params, lr=RATE, eps=1e-5)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """Linear decay to 0."""
        steps = max(1, self.iterations * STEPS)
        return LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | float]:
        """Per episode, `[n]`: the return, which is the number of moves, at most 500."""
        return {"return": episodes(lambda seen: model(seen)[0].argmax(dim=1), batch[0].tolist())}

    def baseline(self) -> dict[str, float]:
        """The mean return of always pushing to the side where the pole leans."""
        seeds = self.eval_data().tensors[0].tolist()
        return {"return": episodes(lambda seen: (seen[:, 2] > 0).long(), seeds).mean().item()}


def carts(count: int) -> list[Any]:
    """`count` environments `CartPole-v1` of Gymnasium.

    Raises:
        DataError: Gymnasium is not installed.
    """
    try:
        import gymnasium
    except ImportError:
        raise DataError(
            "the pole needs Gymnasium for its physics",
            expected="the package gymnasium",
            found="no such package",
            fix="pip install 'lockstep-dlp[games]'",
        ) from None
    return [gymnasium.make("CartPole-v1", disable_env_checker=True) for _ in range(count)]


def episodes(policy: Policy, seeds: Sequence[int]) -> torch.Tensor:
    """The returns of one episode for each seed, `[n]` (float64)."""
    made = carts(len(seeds))
    seen = [cart.reset(seed=seed)[0] for cart, seed in zip(made, seeds, strict=True)]
    returns, live = torch.zeros(len(seeds), dtype=torch.float64), list(range(len(seeds)))
    while live:
        actions = policy(torch.from_numpy(np.stack([seen[index] for index in live]))).tolist()
        still = []
        for index, action in zip(live, actions, strict=True):
            seen[index], reward, fallen, late, _ = made[index].step(action)
            returns[index] += reward
            if not (fallen or late):
                still.append(index)
        live = still
    return returns


@torch.no_grad()
def roll_out(old: torch.Tensor) -> Rollout:
    """The rollout of the policy with these parameters.

    It is seeded from the parameters, so that it is a function of them alone.
    """
    digest = hashlib.blake2b(old.numpy().tobytes(), digest_size=4).digest()
    seed, actor = int.from_bytes(digest, "little"), Actor()
    nn.utils.vector_to_parameters(old, actor.parameters())  # in place of its random ones
    draws = torch.rand(LENGTH, CARTS, generator=torch.Generator().manual_seed(seed))
    made = carts(CARTS)
    now = np.stack([cart.reset(seed=seed + index)[0] for index, cart in enumerate(made)])
    seen = np.empty((LENGTH + 1, CARTS, 4), np.float32)
    after = np.empty((LENGTH, CARTS, 4), np.float32)
    actions = torch.empty(LENGTH, CARTS, dtype=torch.int64)
    rewards, fallen, ended = torch.zeros(3, LENGTH, CARTS)
    for move in range(LENGTH):
        seen[move] = now
        right = actor.policy(torch.from_numpy(now)).softmax(dim=1)[:, 1]
        actions[move] = draws[move] < right
        for index, (cart, action) in enumerate(zip(made, actions[move].tolist(), strict=True)):
            after[move, index], rewards[move, index], fell, late, _ = cart.step(action)
            fallen[move, index], ended[move, index] = fell, fell or late
            now[index] = cart.reset()[0] if fell or late else after[move, index]
    before = torch.from_numpy(seen[:LENGTH])
    logits, values = actor(before)
    gain = advantages(rewards, values, actor(torch.from_numpy(after))[1], fallen, ended)
    return Rollout(
        made_by=old,
        seen=before.flatten(0, 1),
        actions=actions.flatten(),
        log_probabilities=logits.log_softmax(2).gather(2, actions[..., None]).flatten(),
        advantages=((gain - gain.mean()) / (gain.std() + 1e-8)).flatten(),
        returns=(gain + values).flatten(),
    )


def advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    after: torch.Tensor,
    fallen: torch.Tensor,
    ended: torch.Tensor,
) -> torch.Tensor:
    """Generalised advantage estimates; everything is `[moves, carts]`.

    Args:
        rewards: of each move.
        values: of what was seen before it.
        after: of what was seen after it; counted as 0 where the pole has `fallen`.
        fallen: 1 or 0.
        ended: 1 where the episode ended, by a fall or the time limit; the next move begins another.
    """
    surprise = rewards + DISCOUNT * after * (1 - fallen) - values
    found, last = torch.empty_like(rewards), torch.zeros_like(rewards[0])
    for move in reversed(range(len(rewards))):
        last = surprise[move] + DISCOUNT * TRACE * (1 - ended[move]) * last
        found[move] = last
    return found
