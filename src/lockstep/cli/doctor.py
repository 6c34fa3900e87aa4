"""Doctor: checks that this machine meets the requirements, and computes the same bits twice."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.errors import LockstepError
from lockstep.job.task import Parameters, Task
from lockstep.native.library import load_library
from lockstep.system import futex, machine, numerics
from lockstep.system.machine import available_bytes
from lockstep.system.shared_memory import Segment

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Check:
    """Check: the result of one test of this machine."""

    name: str
    good: bool
    found: str


class Examination(Task):
    """A small task with dropout, batch statistics and a short last batch."""

    def model(self) -> nn.Module:
        from torch import nn

        return nn.Sequential(
            nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 2)
        )

    def train_data(self) -> Any:
        import torch
        from torch.utils.data import TensorDataset

        x = torch.randn(250, 16, generator=torch.Generator().manual_seed(0))
        return TensorDataset(x, (x.sum(1) > 0).long())

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        from torch.nn.functional import cross_entropy

        return cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        import torch

        return torch.optim.AdamW(params, lr=0.01)


def examine() -> list[Check]:
    """Every check, in order."""
    return [
        Check(name="python", good=sys.version_info >= (3, 11), found=platform.python_version()),
        _torch(),
        Check(
            name="processor",
            good=platform.machine() == "x86_64",
            found=f"{platform.machine()}, {machine.cores()} cores available",
        ),
        Check(
            name="futex",
            good=True,
            found="available" if futex.available() else "not available: waits poll",
        ),
        _native(),
        _memory(),
        _pidfd(),
        _same_bits(),
    ]


def _torch() -> Check:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return Check(
        name="torch",
        good=torch.__version__ >= "2.13",
        found=f"{torch.__version__}, {capability} kernels, probe {numerics.probe()[:8]}",
    )


def _native() -> Check:
    """Whether the native path is there; everything works without it."""
    library = load_library()
    found = f"built by {library.module.COMPILER}" if library.module else library.why_not
    return Check(name="native path", good=True, found=found)


def _memory() -> Check:
    try:
        Segment.create("doctor", 1 << 20).close()
    except (LockstepError, OSError) as error:
        return Check(name="memory", good=False, found=str(error))
    return Check(
        name="memory",
        good=True,
        found=f"{available_bytes() / 2**30:.1f} GiB of shared memory available",
    )


def _pidfd() -> Check:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return Check(name="pidfd", good=False, found=f"{error}: a kernel of 5.3 or newer is needed")
    return Check(name="pidfd", good=True, found="available")


def _same_bits() -> Check:
    from lockstep.api.training import run

    settings: dict[str, Any] = {
        "shards": 2,
        "threads": 1,
        "batch_size": 64,
        "steps": 12,
        "quiet": True,
    }
    try:
        with tempfile.TemporaryDirectory() as folder:
            prints = [
                run(
                    Examination(), workers=n, out=str(Path(folder) / f"{n}"), **settings
                ).fingerprint
                for n in (1, 2)
            ]
    except LockstepError as error:
        return Check(name="same bits", good=False, found=str(error))
    good = len(set(prints)) == 1
    return Check(
        name="same bits",
        good=good,
        found=f"1 and 2 workers: {prints[0][:16]}" if good else f"{prints[0]} and {prints[1]}",
    )
