"""What `benchmarks.recovery` runs under torchrun: the MNIST CNN with DDP on gloo, checkpointing."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lockstep.recipes.mnist import Mnist

CHECKPOINT_STEPS, STEPS = 10, 100_000


def main(log: Path, checkpoint: Path) -> None:
    """Train until the end; log every step of rank 0, continue from the last checkpoint."""
    dist.init_process_group("gloo")
    rank, restart = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.manual_seed(0)
    task = Mnist("cnn")
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, fused=True)
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    parallel = DistributedDataParallel(model)
    data = task.train_data()
    for step in range(first, STEPS):
        index = torch.randint(len(data), (32,))
        optimizer.zero_grad()
        task.loss(parallel, [tensor[index] for tensor in data.tensors]).backward()
        optimizer.step()
        if rank == 0:
            if step % CHECKPOINT_STEPS == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                partial = checkpoint.with_suffix(".partial")
                torch.save({**state, "step": step}, partial)
                partial.rename(checkpoint)
            with log.open("a") as file:
                line = {"step": step, "restart": restart, "pid": os.getpid(), "time": time.time()}
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
