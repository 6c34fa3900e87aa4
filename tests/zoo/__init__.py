"""Small tasks, each with something that could make the bits depend on the number of workers.

`ZOO` has them by name, with their settings. Most share `Vectors`' sizes: 109 samples in batches of
26, so that shards differ in size and the last step of a data epoch has 5 samples, fewer than there
are shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from lockstep.job.task import Task
from tests.zoo.buffers import (
    Buffers,
    ChannelsLast,
    Images,
    Parametrized,
    ReboundBuffer,
    ViewedBuffers,
)
from tests.zoo.parameters import (
    Brain,
    ByLookahead,
    Double,
    Frozen,
    LeftOut,
    Mixed,
    Mixture,
    OddShapes,
    OtherTypes,
    WideBranches,
)
from tests.zoo.samples import Augmented, Fetched, TurnsNan
from tests.zoo.sequences import Bags, Recurrent, Tied, Transformer
from tests.zoo.vectors import (
    BATCH,
    STEPS,
    By,
    ByEpoch,
    ByLambda,
    Matrices,
    Scheduled,
    Vectors,
    Wide,
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A task and the settings that its numbers depend on, besides `shards`."""

    task: Task
    batch_size: int = BATCH
    steps: int = STEPS
    seed: int = 3
    clip_grad_norm: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    eval_batch_size: int = 7

    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "task"}


ZOO: dict[str, Entry] = {
    "mlp": Entry(task=Vectors()),
    "muon": Entry(task=Matrices("Muon", lr=0.02, weight_decay=0.1)),
    "clip": Entry(task=By("Adam", lr=0.01), clip_grad_norm=0.05),
    "clip-sometimes": Entry(task=Mixture(), clip_grad_norm=0.7),
    "onecycle": Entry(task=Scheduled("AdamW", lr=0.01)),
    "by-epoch": Entry(task=ByEpoch("Adam", lr=0.05)),
    "wide-clipped": Entry(task=Wide("SGD", lr=0.1, momentum=0.9), steps=6, clip_grad_norm=0.1),
    "wide-adafactor": Entry(task=Wide("Adafactor", lr=0.05), steps=6),
    "wide-branches": Entry(task=WideBranches("AdamW", lr=0.01), steps=6),
    "mixture": Entry(task=ByLookahead()),
    "frozen": Entry(task=Frozen("RMSprop", lr=0.01, momentum=0.9, centered=True)),
    "cnn": Entry(task=Images("SGD", lr=0.1, momentum=0.9)),
    "channels-last": Entry(task=ChannelsLast("AdamW", lr=0.01), clip_grad_norm=0.5),
    "buffers": Entry(task=Buffers()),
    "lstm": Entry(task=Recurrent("Adam", lr=0.01)),
    "transformer": Entry(task=Transformer()),
    "tied": Entry(task=Tied("Adam", lr=0.01)),
    "embedding": Entry(task=Bags("Adagrad", lr=0.1)),
    "bf16": Entry(task=Transformer(), precision="bf16", clip_grad_norm=1.0),
    "mixed": Entry(task=Mixed(torch.bfloat16, lr=0.01), clip_grad_norm=0.1),
    "augmented": Entry(task=Augmented()),
}

MORE: dict[str, Entry] = {
    "fused-sgd": Entry(task=By("SGD", lr=0.1, momentum=0.9, fused=True)),
    "clip-left-out": Entry(task=LeftOut(), clip_grad_norm=0.05),
    "odd-shapes": Entry(task=OddShapes()),
    "rebound-buffer": Entry(task=ReboundBuffer()),
    "float64": Entry(task=Double()),
    "doubles": Entry(task=Mixed(torch.float64, kind="SGD", lr=0.1), clip_grad_norm=0.1),
    "parametrized": Entry(task=Parametrized("Adam", lr=0.01)),
    "fetched-at-once": Entry(task=Fetched()),
    "left-out": Entry(task=LeftOut()),
    "mixture-sgd": Entry(task=Mixture()),
    "lambda": Entry(task=ByLambda("SGD", lr=0.5)),
    "wide": Entry(task=Wide("Adam", lr=0.01), steps=6),
    "recomputed": Entry(task=Transformer("plain"), steps=6),
    "reentrant": Entry(task=Transformer("reentrant"), steps=6),
    "other-types": Entry(task=OtherTypes()),
    "viewed-buffers": Entry(task=ViewedBuffers()),
    "bf16-cnn": Entry(task=Images("SGD", lr=0.1), precision="bf16"),
    "bf16-parameters": Entry(task=Brain(), clip_grad_norm=0.1),
    "mixed-unclipped": Entry(task=Mixed(torch.bfloat16, lr=0.01)),
    "doubles-unclipped": Entry(task=Mixed(torch.float64, kind="SGD", lr=0.1)),
    "adam": Entry(task=By("Adam", lr=0.01, weight_decay=0.01)),
    "amsgrad": Entry(task=By("Adam", lr=0.01, amsgrad=True)),
    "fused-adam": Entry(task=By("Adam", lr=0.01, fused=True)),
    "fused-adagrad": Entry(task=By("Adagrad", lr=0.1, fused=True)),
    "foreach-adamw": Entry(task=By("AdamW", lr=0.01, foreach=True)),
    "foreach-sgd": Entry(task=By("SGD", lr=0.1, momentum=0.9, foreach=True)),
    "tensor-rate": Entry(task=Scheduled("Adam", lr=torch.tensor(0.01))),
    "adafactor": Entry(task=By("Adafactor", lr=0.05)),
    "nadam": Entry(task=By("NAdam", lr=0.01)),
    "radam": Entry(task=By("RAdam", lr=0.01)),
    "adamax": Entry(task=By("Adamax", lr=0.01)),
    "asgd": Entry(task=By("ASGD", lr=0.1, t0=5)),
    "rprop": Entry(task=By("Rprop", lr=0.01)),
    "adadelta": Entry(task=By("Adadelta", lr=1.0)),
    "wide-fused-adamw": Entry(task=Wide("AdamW", lr=0.01, fused=True), steps=6),
    "wide-asgd": Entry(task=Wide("ASGD", lr=0.1, t0=2), steps=6),
    "wide-nadam": Entry(task=Wide("NAdam", lr=0.01), steps=6),
    "wide-rprop": Entry(task=Wide("Rprop", lr=0.01), steps=6),
}
"""More of the same kinds, the other optimizers first of all: for the long tests."""


FAILING = {"turns-nan": Entry(task=TurnsNan())}
"""Tasks whose runs end with an error."""


def named(name: str) -> Task:
    """A task of the zoo by name, as hosts are told of it."""
    return {**ZOO, **MORE, **FAILING}[name].task
