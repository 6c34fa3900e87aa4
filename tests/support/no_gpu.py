"""A task whose processes tell when they reach for a GPU, and do not get one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.zoo.vectors import Vectors

TOLD = "LOCKSTEP_TEST_TOLD"
"""The environment variable that names the file in which they tell it."""


def tell(what: str) -> None:
    with open(os.environ[TOLD], "a") as file:
        file.write(f"{what} {os.getpid()} {os.getppid()}\n")


def _reach(*_: Any) -> Any:
    tell("reached")
    for entry in Path(f"/proc/{os.getppid()}/fd").iterdir():
        if os.path.islink(entry) and os.readlink(entry).startswith("/dev/nvidia"):
            tell("descriptor")
    raise RuntimeError("there is none: this is a test")


class NoGpu(Vectors):
    def model(self) -> nn.Module:
        """Called in the forkserver."""
        for name in ("init", "_lazy_init", "set_device", "device_count", "memory_stats"):
            setattr(torch.cuda, name, _reach)
        tell("loaded")
        return super().model()
