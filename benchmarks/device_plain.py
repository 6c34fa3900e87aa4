"""What `benchmarks.device_check` compares with, and what it needs a process of its own for.

python -m benchmarks.device_plain context cuda           seconds until a first kernel has run
python -m benchmarks.device_plain speed cuda mlp ddp 96  samples per second
python -m benchmarks.device_plain ballast 600000000      holds memory until stdin is closed
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import Any

import torch
from torch import nn

from benchmarks import device_tasks
from benchmarks.device_check import BATCH
from lockstep.device.determinism import configure
from lockstep.job.task import Parameters, Task

WARM = 8
"""Steps that do not count."""


def context(device: str) -> float:
    """Seconds from a fresh process, torch loaded, to the end of a first kernel."""
    begun = time.perf_counter()
    where = torch.device("cuda" if device == "cuda" else "cpu")
    torch.ones(1, device=where).add_(1).item()
    return time.perf_counter() - begun


def speed(device: str, name: str, how: str, steps: int) -> float:
    """Samples per second of a plain loop, or of DDP with one process."""
    kind, precision = device_tasks.CASES[name]
    task: Task = getattr(device_tasks, kind)()
    where = torch.device("cuda" if device == "cuda" else "cpu")
    torch.set_num_threads(1)
    configure()
    model: nn.Module = task.model().to(where)
    trained: nn.Module = _ddp(model, where) if how == "ddp" else model
    optimizer: Any = task.optimizer(Parameters(list(model.named_parameters())))
    data: Any = task.train_data()
    begun = 0.0
    for step in range(WARM + steps):
        if step == WARM:
            _wait(where)
            begun = time.perf_counter()
        first = step * BATCH % (len(data) - BATCH + 1)
        batch = [tensor.to(where) for tensor in data[first : first + BATCH]]
        with torch.autocast(where.type, torch.bfloat16, enabled=precision == "bf16"):
            loss: Any = task.loss(trained, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
    _wait(where)
    return BATCH * steps / (time.perf_counter() - begun)


def _ddp(model: nn.Module, where: torch.device) -> nn.Module:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.distributed.init_process_group(
        "nccl" if where.type == "cuda" else "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0,
        world_size=1,
    )  # fmt: skip
    return nn.parallel.DistributedDataParallel(model)


def _wait(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize()


def ballast(left: int) -> None:
    """Take all of the GPU's memory but so many bytes, until stdin is closed."""
    free, _ = torch.cuda.mem_get_info()
    held = torch.empty(max(free - left, 0), dtype=torch.uint8, device="cuda")
    print(len(held), flush=True)
    sys.stdin.read()


def main() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    match sys.argv[1:]:
        case ["context", device]:
            print(context(device))
        case ["speed", device, name, how, steps]:
            print(round(speed(device, name, how, int(steps)), 1))
        case ["ballast", left]:
            ballast(int(left))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
