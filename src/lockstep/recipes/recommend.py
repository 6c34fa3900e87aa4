"""Recipe `recommend`: the next film of a user, by a two-tower model of MovieLens 100k.

The user's tower takes the user and the latest films; the film's tower is its embedding. A film's
score is their product, and the loss a softmax over films, as in Covington, Adams and
Sargin, "Deep Neural Networks for YouTube Recommendations", 2016. The last film of every
user is held out (leave one out), and ranked among all films that the user has not seen.
`docs/applications.md` reports metrics and times.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import TensorDataset

from lockstep.errors import DataError
from lockstep.job.job import Job
from lockstep.job.task import Parameters, Task
from lockstep.recipes import at_least, texts
from lockstep.recipes.datasets import load_ratings
from lockstep.recipes.datasets.movielens import Ratings

BATCH_SIZE = 512
LENGTH = 20
"""The number of latest films that the model takes."""
TOP = 10
"""The number of films in a recommendation."""
PADDING = 0
"""The number of no film; film `i` of the data has the number `i + 1` in the model."""


def recommend(data: str | None = None, epochs: float = 10, width: int = 64) -> Job:
    """Recommend the next item of each user.

    Args:
        data: A table of ratings, as `lockstep.recipes.datasets.load_ratings` reads it (CSV or TSV
            with user_id, item_id and optionally timestamp). None: MovieLens 100k.
        epochs: Passes over the data.
        width: Length of the embeddings.
    """
    texts(data=data)
    at_least(1, width=width)
    task = Recommend(data, width)
    return Job(task=task, batch_size=BATCH_SIZE, data_epochs=epochs)


class Towers(nn.Module):
    """Two-tower model: scores of all items for users with their latest items."""

    def __init__(self, users: int, items: int, width: int) -> None:
        super().__init__()
        self.users = nn.Embedding(users, width)
        self.items = nn.Embedding(items + 1, width, padding_idx=PADDING)
        self.recent = nn.Parameter(torch.zeros(LENGTH))
        self.tower = nn.Sequential(
            nn.Dropout(0.3), nn.Linear(2 * width, 2 * width), nn.GELU(), nn.Dropout(0.3),
            nn.Linear(2 * width, width),
        )  # fmt: skip
        self.popular = nn.Parameter(torch.zeros(items + 1))
        for embedding in (self.users, self.items):
            nn.init.normal_(embedding.weight, std=width**-0.5)

    def forward(self, users: torch.Tensor, recent: torch.Tensor) -> torch.Tensor:
        """Users `[n]` and their latest items `[n, LENGTH]` (int64) to scores `[n, items + 1]`."""
        there = recent != PADDING
        weights = self.recent.masked_fill(~there, -1e9).softmax(dim=1) * there
        history = (weights.unsqueeze(1) @ self.items(recent)).squeeze(1)
        person = self.tower(torch.cat([self.users(users), history], dim=1)) + history
        scores: torch.Tensor = person @ self.items.weight.T + self.popular
        return scores


class Recommend(Task):
    """Task of the recipe `recommend`."""

    scheduler_interval = "data_epoch"

    def __init__(self, data: str | None = None, width: int = 64) -> None:
        self.data, self.width = data, width

    @functools.cached_property
    def ratings(self) -> Ratings:
        """The ratings in order, read on first use."""
        return load_ratings(self.data)

    @functools.cached_property
    def histories(self) -> list[torch.Tensor]:
        """The items of each user, `[n]`, the earliest first, as the model's numbers."""
        ends = np.flatnonzero(np.diff(self.ratings.users)) + 1
        return list(map(torch.from_numpy, np.split(self.ratings.items + 1, ends)))

    def model(self) -> nn.Module:
        """Fresh towers."""
        return Towers(len(self.ratings.user_names), len(self.ratings.item_names), self.width)

    def train_data(self) -> TensorDataset:
        """`(user, items before, item)` for each item but a user's first and last."""
        users, before, items = [], [], []
        for user, history in enumerate(self.histories):
            padded = F.pad(history[:-2], (LENGTH - 1, 0), value=PADDING)
            before.append(padded.unfold(0, LENGTH, 1) if len(history) > 2 else padded[:0, None])
            items.append(history[1:-1])
            users.append(torch.full((len(items[-1]),), user))
        before = [rows for rows in before if len(rows)]
        if not before:
            raise DataError(
                "there is nothing to learn from in these ratings",
                expected="users with three items or more: the last is held out",
                found=f"{len(self.histories)} users, none with three",
                fix="look at the column user_id",
            )
        return TensorDataset(torch.cat(users), torch.cat(before), torch.cat(items))

    def eval_data(self) -> TensorDataset:
        """`(user, items before, last item, all items before)` for each user with two or more."""
        known = [(user, history) for user, history in enumerate(self.histories) if len(history) > 1]
        longest = max(len(history) for _, history in known)
        seen = [F.pad(history[:-1], (longest - len(history), 0)) for _, history in known]
        return TensorDataset(
            torch.tensor([user for user, _ in known]),
            F.pad(torch.stack(seen), (LENGTH, 0))[:, -LENGTH:],
            torch.stack([history[-1] for _, history in known]),
            torch.stack(seen),
        )

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Mean cross-entropy of the next item, among all items."""
        users, before, items = batch[:3]
        return F.cross_entropy(model(users, before), items)

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(params, lr=2e-3, weight_decay=0.05)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> ExponentialLR:
        """A learning rate that falls by a constant factor every data epoch."""
        return ExponentialLR(optimizer, gamma=0.85)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, torch.Tensor | float]:
        """Per user, `[n]`: the loss, and hit rate and NDCG of the first `TOP` items."""
        users, before, items, seen = batch
        scores = model(users, before)
        return {
            "loss": F.cross_entropy(scores, items, reduction="none"),
            **ranking(unseen(scores, seen), items),
        }

    def baseline(self) -> dict[str, float]:
        """Hit rate and NDCG of recommending the most popular items to everybody."""
        _, _, items, seen = self.eval_data().tensors
        known = torch.cat([history[:-1] for history in self.histories])
        taken = torch.bincount(known, minlength=len(self.ratings.item_names) + 1).double()
        values = ranking(unseen(taken.repeat(len(items), 1), seen), items)
        return {name: value.double().mean().item() for name, value in values.items()}

    def fitted(self) -> str:
        """The names of users and items, in the order of their numbers."""
        return json.dumps([self.ratings.user_names, self.ratings.item_names])

    def from_record(self, record: Mapping[str, Any]) -> torch.Tensor:
        """A user, from `user`: one of the ratings' `user_id`."""
        names = self.ratings.user_names
        user = record.get("user")
        user = str(int(user) if isinstance(user, float) and user.is_integer() else user)
        if user not in names:
            raise DataError(
                f"there is no user {user} in the ratings",
                expected='{"user": one of the ratings\' user_id}',
                found=f"the columns {', '.join(record)}",
            )
        return torch.tensor(names.index(user))

    def predict(self, model: nn.Module, users: torch.Tensor) -> list[dict[str, Any]]:
        """For each of the users (`[n]`, numbers of the data), up to `TOP` recommended items."""
        known = [self.histories[user] for user in users.tolist()]
        before = torch.stack([F.pad(h[-LENGTH:], (LENGTH - min(len(h), LENGTH), 0)) for h in known])
        seen = nn.utils.rnn.pad_sequence(known, batch_first=True, padding_value=PADDING)
        scores = unseen(model(users, before), seen)
        best = scores.topk(min(TOP, scores.shape[1]))
        left = (best.values > -torch.inf).sum(dim=1)  # of few items, fewer than `TOP` are unseen
        names = self.ratings.item_names
        return [
            {
                "user": self.ratings.user_names[user],
                "items": [names[item - 1] for item in items[:count]],
            }
            for user, items, count in zip(
                users.tolist(), best.indices.tolist(), left.tolist(), strict=True
            )
        ]


def unseen(scores: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """`scores` `[n, items]` with -inf for the items in `seen` `[n, any]` and for padding."""
    return scores.scatter(1, seen, -torch.inf).index_fill(1, torch.tensor([PADDING]), -torch.inf)


def ranking(scores: torch.Tensor, items: torch.Tensor) -> dict[str, torch.Tensor]:
    """HR and NDCG at `TOP` of `items` `[n]` by `scores` `[n, items]`; `[n]` each.

    An item's rank is the number of items with a higher score, plus half of those with the same
    score, which is its mean rank among them.
    """
    own = scores.gather(1, items[:, None])
    rank = (scores > own).sum(dim=1) + ((scores == own).sum(dim=1) - 1) / 2
    hit = rank < TOP
    return {f"hr@{TOP}": hit, f"ndcg@{TOP}": hit / torch.log2(rank + 2)}
