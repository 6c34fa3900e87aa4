"""Tasks whose workers' own homes are watched, or forget to settle."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from lockstep.device.apart import ApartDevice
from lockstep.device.staged import StagedDevice
from lockstep.state.shared_state import SharedState
from lockstep.worker import main as worker_main
from lockstep.worker.home_moves import HomeMoves
from tests.zoo.buffers import Images
from tests.zoo.vectors import Vectors

HOME, SETTLE, REST = ApartDevice.home, ApartDevice.settle, HomeMoves.rest
RESTS: list[int] = []
"""After how many steps this process has come to rest, since it is a worker."""
DEVICES: list[ApartDevice] = []
"""That of this process, once it is a worker with a home."""


def _rest(moves: HomeMoves, step: int) -> None:
    RESTS.append(step)
    REST(moves, step)


def _home(device: ApartDevice, shared: SharedState) -> SharedState:
    DEVICES.append(device)
    return HOME(device, shared)


class Counts(Vectors):
    """Logs how many bytes its worker has moved so far, and how often it has rested."""

    def model(self) -> nn.Module:
        ApartDevice.home = _home  # type: ignore[method-assign, assignment]  # in this run's processes alone
        HomeMoves.rest = _rest  # type: ignore[method-assign, assignment]
        return super().model()

    def loss(self, model: nn.Module, batch: Any) -> Any:
        loss = super().loss(model, batch)
        moved = DEVICES[-1].moved if DEVICES else 0
        return loss, {"moved": float(moved), "rests": float(len(RESTS))}


class Staged(Images):
    """Its workers have the device that `cuda` is made of, on the CPU."""

    def __init__(self) -> None:
        super().__init__("Adam", lr=0.01)

    def model(self) -> nn.Module:
        def device_of(name: str, worker_id: int = 0) -> StagedDevice:
            room = torch.empty(5000, dtype=torch.uint8)
            return StagedDevice(torch.device("cpu"), room, lambda: None)

        setattr(worker_main, "device_of", device_of)  # noqa: B010  # it is imported there
        return super().model()


class Forgetful(Images):
    """Its workers leave out `settle` where it is called by the function of this name."""

    def __init__(self, caller: str) -> None:
        super().__init__("SGD", lr=0.1, momentum=0.9)
        self.caller = caller

    def model(self) -> nn.Module:
        caller = self.caller

        def settle(device: ApartDevice) -> None:
            if sys._getframe(1).f_code.co_name != caller:
                SETTLE(device)

        ApartDevice.settle = settle  # type: ignore[method-assign, assignment]
        return super().model()
