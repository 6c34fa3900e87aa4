"""One contender on one model, in fresh processes: prints one JSON line of what it measured.

    python -m benchmarks.peers ddp mlp --seconds 2
    python -m benchmarks.peers lockstep mlp --steps 3000

`benchmarks.run` starts this once per measurement. A line `steady` comes before it when the timed
part begins, from the contenders that are timed here. The launching process of the two-process
contenders does not import torch, so that it adds next to nothing to their memory.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from benchmarks.meeting import WORDS, Meeting
from benchmarks.report import OURS
from lockstep.system.shared_memory import set_allocator

if TYPE_CHECKING:
    from torch import nn

WAIT = 120.0
"""Seconds after which any wait for another process gives up; a recipe may learn a vocabulary."""
WARM_STEPS = 10
"""Steps before the clock may start; `WARM_SHARE` of the measured time at least, too."""
WARM_SHARE = 0.25

Timed = dict[str, float]
"""`samples` computed in `seconds` by one process, in `steps`."""


class Gate(Protocol):
    """The barrier of a contender's processes before the clock starts."""

    def wait(self, timeout: float | None = None) -> Any:
        """Return when all have come, or raise."""
        ...


def contend(
    contender: str,
    name: str,
    seconds: float,
    gate: Gate | None,
    rank: int,
    words: Any = None,
    world: int = 0,
) -> Timed:
    """Train in this process and time it: any contender but `lockstep` and `auto`. `world`: how many
    processes it has, if not `models.WORLD`."""
    import torch

    from benchmarks import models, recipes

    alone, world = contender in ALONE, world or models.WORLD
    torch.set_num_threads(world if alone else 1)
    case = recipes.find(name)
    batch = case.batch * (world if alone else 1)
    world = 1 if alone else world
    model = case.model()
    named = list(model.named_parameters())  # outlives DDP's wrapper, whose end would hang else
    if contender in DDP:
        model = _distributed(model, rank, world)
    optimizer = case.optimizer(named)
    draw = case.draw(batch, rank, world)

    meeting = Meeting(words, rank) if contender == "meet" else None
    meet = meeting.meet if meeting is not None else lambda: None
    loss = torch.compile(case.loss) if contender == "compiled" else case.loss

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(model, draw()).backward()
        meet()
        case.update(optimizer)
        meet()

    for _ in range(WARM_STEPS):
        step()
    if contender in DDP:
        steps, elapsed = _for_steps(step, seconds, rank, _broadcast)
        torch.distributed.destroy_process_group()
    elif meeting is not None:
        steps, elapsed = _for_steps(step, seconds, rank, meeting.agree)
    else:
        steps, elapsed = _for_seconds(step, seconds, gate, rank)
    return {"samples": steps * batch, "seconds": elapsed, "steps": steps}


LOCKSTEP = ("lockstep", "lockstep_compiled", "auto")
ALONE = ("threads", "compiled")
"""The contenders that are one process of torch, with all cores."""
DDP = ("ddp", "ddp_malloc")
"""The contenders that are DistributedDataParallel."""
ALLOCATOR = ("ddp_malloc", "nosync", "meet")
"""The contenders whose processes get the allocator settings that Lockstep gives its workers."""


def _distributed(model: nn.Module, rank: int, world: int) -> nn.Module:
    """`model` under DistributedDataParallel over gloo, on the loopback interface."""
    import datetime

    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['BENCHMARK_MEET']}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=WAIT),
    )
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def _broadcast(number: int) -> int:
    """Rank 0's number, for all, once all have come."""
    import torch
    import torch.distributed as dist

    found = torch.tensor([number])
    dist.broadcast(found, 0)
    dist.barrier()
    return int(found.item())


def _for_steps(
    step: Callable[[], None], seconds: float, rank: int, agree: Callable[[int], int]
) -> tuple[int, float]:
    """Run about `seconds`, in a number of steps that rank 0 chooses for all."""
    began = time.perf_counter()
    for _ in range(WARM_STEPS):
        step()
    each = (time.perf_counter() - began) / WARM_STEPS
    for _ in range(agree(int(WARM_SHARE * seconds / each))):
        step()
    count = agree(max(5, int(seconds / each)))
    _say_steady(rank)
    began = time.perf_counter()
    for _ in range(count):
        step()
    return count, time.perf_counter() - began


def _for_seconds(
    step: Callable[[], None], seconds: float, gate: Gate | None, rank: int
) -> tuple[int, float]:
    """Run until `seconds` have passed, after a warm-up and the common gate."""
    clock = time.perf_counter
    until = clock() + WARM_SHARE * seconds
    while clock() < until:
        step()
    if gate is not None:
        gate.wait(WAIT)
    _say_steady(rank)
    steps = 0
    began = now = clock()
    while now - began < seconds:
        step()
        steps += 1
        now = clock()
    return steps, now - began


def _say_steady(rank: int) -> None:
    if rank == 0:
        print("steady", flush=True)


def _member(
    contender: str, name: str, seconds: float, gate: Gate, rank: int, words: Any, results: Any
) -> None:
    """A spawned process: contend, and put what was timed, or why it failed, into `results`."""
    try:
        results.put(contend(contender, name, seconds, gate, rank, words))
    except BaseException:
        results.put(traceback.format_exc())
        raise


def together(contender: str, name: str, seconds: float) -> list[Timed]:
    """Run a two-process contender; every process is gone when this returns or raises."""
    context = multiprocessing.get_context("spawn")
    gate, results = context.Barrier(2), context.Queue()
    words = context.RawArray("i", WORDS)
    members = [
        context.Process(
            target=_member,
            args=(contender, name, seconds, gate, rank, words, results),
            daemon=True,
        )
        for rank in range(2)
    ]
    timed: list[Timed] = []
    try:
        for member in members:
            member.start()
        until = time.monotonic() + WAIT + 3 * seconds
        while len(timed) < len(members):
            try:
                result = results.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"{contender} on {name}: no result in time") from None
            if isinstance(result, str):
                raise RuntimeError(f"{contender} on {name} failed:\n{result}")
            timed.append(result)
        for member in members:
            member.join(WAIT / 6)
    finally:
        for member in members:
            if member.is_alive():
                member.kill()
                member.join(WAIT / 6)
    return timed


def lockstep(contender: str, name: str, steps: int, out: str | None) -> dict[str, Any]:
    """Run Lockstep on two workers of one thread, compiled if that is the contender, or as its own
    plan has it.

    `name` is a model of the benchmark or a recipe.
    """
    import lockstep as package
    from benchmarks import models, recipes, tasks

    batch = recipes.find(name).batch * models.WORLD
    fixed: dict[str, Any] = {
        "workers": models.WORLD, "shards": models.WORLD, "threads": 1, "trace": "always",
        "compile": contender == "lockstep_compiled",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as folder:
        began = time.perf_counter()
        result = package.run(
            tasks.Benchmark(name) if name in models.CASES else name,
            args=recipes.ARGS.get(name),
            steps=steps,
            batch_size=batch,
            evaluate=False,
            out=out or str(Path(folder) / "run"),
            quiet=True,
            **({} if contender == "auto" else fixed),
        )
        whole = time.perf_counter() - began
    return {
        "rate": result.samples_per_second,
        "steps": steps,
        "seconds": steps * batch / result.samples_per_second,
        "whole_seconds": whole,
        "fingerprint": result.fingerprint,
        "plan": {key: getattr(result, key) for key in ("workers", "threads", "shards")},
    }


def measure(contender: str, name: str, seconds: float, steps: int, out: str | None) -> Any:
    """What a contender did on a model: `rate` in samples per second, `steps`, `seconds`."""
    if contender in LOCKSTEP:
        return lockstep(contender, name, steps, out)
    if contender in ALONE:
        timed = [contend(contender, name, seconds, None, 0)]
    else:
        timed = together(contender, name, seconds)
    slowest = max(t["seconds"] for t in timed)
    if contender == "nosync":
        rate = sum(t["samples"] / t["seconds"] for t in timed)
    else:
        rate = sum(t["samples"] for t in timed) / slowest
    return {"rate": rate, "steps": max(t["steps"] for t in timed), "seconds": slowest}


def main() -> None:
    """Measure as the arguments say; print the result as one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=[*OURS, "sizes", "idle"])
    parser.add_argument("model", nargs="?", default="softmax")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=100, help="for lockstep and auto")
    parser.add_argument("--out", help="run folder, for lockstep and auto (default: a temporary)")
    args = parser.parse_args()
    if args.contender == "sizes":
        from benchmarks import models

        result: Any = models.sizes(args.model)
    elif args.contender == "idle":
        import torch

        print("steady", flush=True)
        time.sleep(args.seconds)
        result = {"torch": torch.__version__}
    else:
        with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as folder:
            os.environ["BENCHMARK_MEET"] = str(Path(folder) / "meet")
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            if args.contender in ALLOCATOR:
                set_allocator(os.environ)
            result = measure(args.contender, args.model, args.seconds, args.steps, args.out)
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
