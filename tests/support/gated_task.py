"""A task for tests that have to catch a run under way and let it go on: a file makes it slow."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from tests.support.paced_task import Paced
from tests.support.ray_cluster import GATE

SLOW_SECONDS = 0.5


class Gated(Paced):
    """While the file that `LOCKSTEP_TEST_GATE` names is there, each shard takes its time."""

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        if model.training and Path(os.environ.get(GATE, "/nowhere")).exists():
            time.sleep(SLOW_SECONDS)
        return super().loss(model, batch)
