"""A team on one host: what a shard takes that two workers compute together.

Compared with one process of one thread and with one of as many threads as the team has members,
both with the plain module. Each way is computed in processes of its own, in turn, several times;
what is shown is the best pass, which others on the machine disturb least, and the best median of
a round. Parameters, and the slots that gradients are copied to, lie in shared memory, as in a
worker.

python -m benchmarks.slices --team 2 [--width 4096] [--batch 8] [--layers 4]
"""

from __future__ import annotations

import copy
import functools
import math
import os
import statistics
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from lockstep.slices.board import SPINS, Board
from lockstep.slices.board_memory import NOTHING_LEFT, BoardMemory
from lockstep.slices.cuts import choose_cuts
from lockstep.slices.slicing import slice_model, slice_numbers
from lockstep.slices.team import Team, computing_with
from lockstep.slices.words import words_of
from lockstep.system.shared_memory import Segment

ROUNDS, WARM = 5, 2
Pass = Callable[[nn.Module, torch.Tensor], None]


def forward(model: nn.Module, x: torch.Tensor) -> None:
    """A forward pass alone."""
    with torch.no_grad():
        model(x)


def both(model: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward."""
    model(x).square().mean().backward()


def layers(width: int, count: int) -> nn.Module:
    """Square layers, one after the other."""
    found = [nn.Linear(width, width) for _ in range(count)]
    return nn.Sequential(*(part for layer in found for part in (layer, nn.ReLU())))


def sliced(model: nn.Module, slices: int) -> nn.Module:
    """A copy of a model in slices."""
    found = copy.deepcopy(model)
    slice_model(found, choose_cuts(found, slices, words_of(found, None), {}), slices)
    return found


def to_shared_memory(model: nn.Module, own: Callable[[nn.Parameter], bool]) -> None:
    """Move parameters to shared memory; gradients of the own ones are copied to such memory, and
    all are dropped, as soon as they are there."""
    for parameter in model.parameters():
        parameter.data = _shared(parameter.data)
        slot = _shared(torch.zeros_like(parameter.data)) if own(parameter) else None
        parameter.register_post_accumulate_grad_hook(_keeper(slot))


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    segment = Segment.create("benchmark", tensor.nbytes)
    flat = torch.frombuffer(segment.map, dtype=tensor.dtype)[: tensor.numel()]
    return flat.view(tensor.shape).copy_(tensor)


def _keeper(slot: torch.Tensor | None) -> Callable[[Any], None]:
    def keep(leaf: Any) -> None:
        if slot is not None:
            slot.copy_(leaf.grad)
        leaf.grad = None

    return keep


def alone(model: nn.Module, x: torch.Tensor, threads: int, run: Pass, passes: int) -> list[float]:
    """The seconds of each pass of one process."""
    torch.set_num_threads(threads)
    taken = []
    for _ in range(WARM + passes):
        begun = time.perf_counter()
        run(model, x)
        taken.append(time.perf_counter() - begun)
    return taken[WARM:]


def member(
    memory: BoardMemory, rank: int, size: int, epoch: int,
    model: nn.Module, x: torch.Tensor, run: Pass, passes: int,
) -> list[float]:  # fmt: skip
    """The same of a member of a team; as its leader, one says when each begins."""
    torch.set_num_threads(1)
    board = Board(
        memory, range(size), rank, epoch, spins=SPINS, look=lambda: None, awaits=lambda _: None
    )
    team, taken = Team(board, size), []
    for number in range(WARM + passes):
        begun = time.perf_counter()
        board.announce(number) if board.leads else board.follow()
        with computing_with(team):
            run(model, x)
        board.finish(0.0, 0)
        taken.append(time.perf_counter() - begun)
    board.announce(NOTHING_LEFT) if board.leads else board.follow()
    return taken[WARM:]


def in_forks(works: Sequence[Callable[[], list[float]]]) -> list[float]:
    """Run each in a process of its own, side by side; what the first one returns."""
    reader, writer = os.pipe()
    pids = []
    for number, work in enumerate(works):
        pid = os.fork()
        if pid == 0:
            try:
                found = work()
                if number == 0:
                    os.write(writer, struct.pack(f"{len(found)}d", *found))
            finally:
                os._exit(0)
        pids.append(pid)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        data = file.read()
    for pid in pids:
        os.waitpid(pid, 0)
    return list(struct.unpack(f"{len(data) // 8}d", data))


def measure(
    width: int, batch: int, count: int, size: int, run: Pass, passes: int
) -> dict[str, tuple[float, float]]:
    """Seconds of the best pass and of the best median, by way of computing it."""
    plain = layers(width, count)
    parts, x = sliced(plain, size), torch.randn(batch, width)
    numbers = slice_numbers(parts)
    to_shared_memory(plain, lambda _: True)
    to_shared_memory(parts, lambda parameter: id(parameter) in numbers)
    memory = BoardMemory.create(size)
    best: dict[str, tuple[float, float]] = {}
    for epoch in range(1, ROUNDS + 1):
        ways: dict[str, list[Callable[[], list[float]]]] = {
            "one worker of one thread": [lambda: alone(plain, x, 1, run, passes)],
            f"one process of {size} threads": [lambda: alone(plain, x, size, run, passes)],
            f"one worker, {size} slices": [lambda: alone(parts, x, 1, run, passes)],
            f"a team of {size}": [
                functools.partial(member, memory, rank, size, epoch, parts, x, run, passes)
                for rank in range(size)
            ],
        }
        for name, works in ways.items():
            taken = in_forks(works)
            one, other = best.get(name, (math.inf, math.inf))
            best[name] = min(one, *taken), min(other, statistics.median(taken))
    memory.close()
    return best


def show(width: int, batch: int, count: int, size: int, passes: int) -> None:
    """Print a table."""
    torch.set_num_threads(1)  # before a fork there must be no other threads
    torch.manual_seed(0)
    print(f"{count} layers of {width} x {width}, batch {batch}, milliseconds of a pass")
    for name, run in (("forward", forward), ("forward and backward", both)):
        found = measure(width, batch, count, size, run, passes)
        team = found[f"a team of {size}"]
        print(f"\n{name:<26} {'best':>9} {'team / this':>12} {'median':>9} {'team / this':>12}")
        for way, times in found.items():
            columns = [
                f"{1e3 * t:>9.2f} {own / t:>12.3f}" for t, own in zip(times, team, strict=True)
            ]
            print(f"  {way:<24} {' '.join(columns)}")
