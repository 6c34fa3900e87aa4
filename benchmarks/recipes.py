"""The recipes compared with DistributedDataParallel on the same task: samples per second.

    python -m benchmarks.recipes vision,clicks --repeats 3 --seconds 4

Both have two processes of one thread, the recipe's own batch size, precision, limit of the norm and
schedule, fetch their batches alike and leave evaluation out; what differs is how they synchronise.
They take turns as in benchmarks.run, and the faster of DDP's two settings of malloc stands for it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from benchmarks import models, process, report, run
from lockstep import recipes
from lockstep.data.fetching import make_fetch
from lockstep.job.job import Job
from lockstep.job.task import Parameters, Task

COMPARED = (
    "mnist", "vision", "recommend", "clicks", "translate", "summarise", "game", "cartpole"
)  # fmt: skip
ARGS = {"mnist": {"model": "cnn"}}
"""What a recipe is given, by its name."""


class Whole(nn.Module):
    """A task's model and its loss as one module.

    So DistributedDataParallel wraps tasks whose loss does more with the model than to call it once.
    """

    def __init__(self, task: Task, half: bool) -> None:
        super().__init__()
        self.model, self._task, self._half = task.model(), task, half

    def forward(self, batch: Any) -> torch.Tensor:
        """The loss of a batch, in the job's precision."""
        half = torch.autocast("cpu", torch.bfloat16) if self._half else contextlib.nullcontext()
        with half:
            loss: torch.Tensor = self._task.loss(self.model, batch)
            return loss


class Recipe:
    """A job as a contender trains it: what `models.Case` is to the benchmark's own models."""

    def __init__(self, job: Job) -> None:
        assert isinstance(job.task, Task)
        assert job.batch_size
        self.task, self.batch = job.task, job.batch_size // models.WORLD
        self.half, self.limit = job.precision == "bf16", job.clip_grad_norm
        self._schedule: Any = None

    def model(self) -> nn.Module:
        """The model with its loss, freshly initialised, the same one each time."""
        torch.manual_seed(0)
        return Whole(self.task, self.half)

    def optimizer(self, named: models.Named) -> torch.optim.Optimizer:
        """The task's own, with its schedule."""
        own = [(name.removeprefix("model."), parameter) for name, parameter in named]
        optimizer = self.task.optimizer(Parameters(own))
        self._schedule = self.task.scheduler(optimizer)
        return optimizer

    def draw(self, batch: int, rank: int = 0, world: int = 1) -> Callable[[], Any]:
        """Batches as Lockstep fetches them, by slices of a permutation as `models.Draw` has it.

        From here on, what a loss draws at random differs by rank.
        """
        data = self.task.train_data()
        fetch = make_fetch(self.task, data, seed=0)
        numbers = torch.arange(len(data))  # type: ignore[arg-type]
        chosen = models.Draw((numbers, numbers), batch, rank, world)
        torch.manual_seed(rank)
        return lambda: fetch(0, chosen()[0].numpy())

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The task's; `model` is what `model` gave, or a wrapper of it."""
        loss: torch.Tensor = model(batch)
        return loss

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Use the gradients, their norm limited if the job says so, and step the schedule."""
        if self.limit is not None:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            clip_grad_norm_(params, self.limit)
        optimizer.step()
        if self._schedule is not None and self.task.scheduler_interval == "step":
            self._schedule.step()


def find(name: str) -> models.Case | Recipe:
    """A model of the benchmark, or a recipe."""
    known = {**models.CASES, **models.BESIDE}
    return known[name] if name in known else Recipe(recipes.find(name)(**ARGS.get(name, {})))


CONTENDERS = ("lockstep", *report.DDP)


def row(name: str, rates: report.Rates) -> list[str]:
    """A line of the table: the contenders' median rates, and the ratio by repetitions."""
    medians = [report.rate(report.typical(rates, contender)) for contender in CONTENDERS]
    ratio = report.pairwise(rates, "lockstep", report.best(rates, report.DDP))
    spread = ["—", "—"]
    if ratio is not None:
        spread = [f"{ratio.middle:.2f}", f"{ratio.low:.2f} to {ratio.high:.2f}"]
    return [f"`{name}`", *medians, *spread]


def main() -> int:
    """Measure the recipes that are named, and print the table; 1 if something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    known = run.choice(COMPARED)
    parser.add_argument("recipes", nargs="?", type=known, default=list(COMPARED))
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--force", action="store_true", help="measure on a busy machine too")
    options = parser.parse_args()
    if not run.quiet_enough(options.force):
        return 1
    process.adopt_orphans()
    rows, failed = [], False
    for name in options.recipes:
        found = run.attempt(
            functools.partial(run.speed, name, CONTENDERS, options.repeats, options.seconds)
        )
        rates = {} if found is None else found["rates"]
        failed |= not rates or None in itertools.chain.from_iterable(rates.values())
        rows.append(row(name, rates))
    print(report.table(("samples/s", *CONTENDERS, "ratio", "least to greatest"), rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
