"""A task with a large embedding table."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lockstep.state.embedding_tables import LARGE
from tests.zoo.sequences import Tokens


class LargeTable(Tokens):
    def __init__(self) -> None:
        super().__init__("SGD", lr=0.1)

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(LARGE // 8, 8), nn.Linear(8, self.vocabulary))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        tokens = batch[0]
        return functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )
