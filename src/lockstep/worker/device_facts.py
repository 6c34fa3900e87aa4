"""Device facts: what a device is and computes, found by a fork.

A process that has touched CUDA cannot be forked into one that may, so the forkserver never does.
"""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

from lockstep.device.choice import device_of
from lockstep.errors import LockstepError, ResourceError, TaskError
from lockstep.worker.fork_setup import ask_fork

NOT_INITIALIZED = 3
"""What the CUDA driver answers before it is initialised (CUDA_ERROR_NOT_INITIALIZED)."""
OPEN_SECONDS = 300
"""The longest that opening a device and computing the probe may take."""
PROBE = "device_probe"
"""The name of the probe in a numerics profile, where it is not the CPU's."""


def device_facts(name: str) -> dict[str, Any]:
    """What of a device belongs in the numerics profile; "cpu" and "cpu-apart" have nothing.

    Raises:
        ResourceError: the device is not there.
        TaskError: the task has touched CUDA in this process.
    """
    if name != "cuda":
        return device_of(name).profile()
    check_untouched()
    answer = ask_fork(lambda: json.dumps(_facts(name)).encode(), OPEN_SECONDS)
    found: dict[str, Any] = json.loads(answer or b"{}")
    if PROBE not in found:
        raise ResourceError(
            found.get("what", "device: cuda, and a process that opened it has died"),
            expected="an NVIDIA GPU, its driver, and torch's build for CUDA",
            found=found.get("found", "no answer"),
            fix="leave device out; look at nvidia-smi and torch.version.cuda",
        )
    return found


def _facts(name: str) -> dict[str, Any]:
    """What a fork finds; or why it finds nothing."""
    try:
        device = device_of(name)
        return {**device.profile(), PROBE: device.probe()}
    except LockstepError as error:
        return {"what": error.what, "found": error.found}
    except Exception as error:  # whatever torch says of a GPU
        return {"what": "device: cuda, and a GPU fails", "found": str(error)[:500]}


def check_untouched() -> None:
    """Refuse a task that has touched CUDA where workers are to be forked.

    torch knows of its own calls only, so the driver is asked, too, where something has loaded it.

    Raises:
        TaskError: it has.
    """
    import torch

    if torch.cuda.is_initialized() or _driver_is_initialized():
        raise TaskError(
            "CUDA was initialised before workers were forked: none of them could use it",
            expected="a task that leaves the GPU alone until its loss is called",
            found="CUDA initialised by Task.model, Task.train_data, or what the module imports",
            fix="build the model on the CPU, and leave out .cuda() and .to('cuda'): it is moved",
        )


def _driver_is_initialized() -> bool:
    if "/libcuda.so" not in Path("/proc/self/maps").read_text():
        return False
    driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    return bool(driver.cuDeviceGetCount(ctypes.byref(count)) != NOT_INITIALIZED)
