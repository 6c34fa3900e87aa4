"""Host recovery: what a host's death or joining costs: two hosts on loopback, one worker each.

    python -m benchmarks.host_recovery --times 10 --write docs/host-recovery.md

A host's agent is killed (SIGKILL) while an MLP trains whose state is 100 MB (8.7 million
parameters under Adam); a new one joins; and so on in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.job.task import Parameters, Task

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils.data import Dataset

WAIT = 60.0


class Large(Task):
    """An MLP with a state of 100 MB."""

    def model(self) -> nn.Module:
        from torch import nn

        return nn.Sequential(
            nn.Linear(784, 2048), nn.ReLU(), nn.Linear(2048, 2816), nn.ReLU(), nn.Linear(2816, 481)
        )

    def train_data(self) -> Dataset[Any]:
        import torch
        from torch.utils.data import TensorDataset

        torch.manual_seed(0)
        return TensorDataset(torch.randn(4096, 784), torch.randint(10, (4096,)))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        from torch.nn import functional

        return functional.cross_entropy(model(batch[0]), batch[1])

    def optimizer(self, params: Parameters) -> torch.optim.Optimizer:
        import torch

        return torch.optim.Adam(params, lr=1e-3, fused=True)


def read(folder: Path) -> list[dict[str, Any]]:
    """The run's events so far."""
    path = folder / "events.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def wait_for(folder: Path, wanted: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """The events when they have what is wanted."""
    limit = time.monotonic() + WAIT
    while time.monotonic() < limit:
        found = read(folder)
        if wanted(found):
            return found
        time.sleep(0.01)
    raise TimeoutError(f"nothing within {WAIT} s in {folder}")


def measure(times: int) -> dict[str, list[float]]:
    """Milliseconds: from each kill, and from each joining, to the next committed step."""
    import lockstep
    from tests.support.agents_on_loopback import Agents
    from tests.support.tls_hosts import Cluster

    found: dict[str, list[float]] = {"died": [], "joined": []}
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as name:
        folder = Path(name)
        on = Agents(Cluster(folder / "cluster"), {"b0": 1}, 1)
        run = lockstep.start(
            "benchmarks.host_recovery:Large", on=on, workers=2, shards=2, threads=1, batch_size=128,
            steps=100_000, evaluate=False, quiet=True, out=str(folder / "run"),
        )  # fmt: skip
        out = folder / "run"

        def regrouped(events: list[dict[str, Any]]) -> list[float]:
            return [event["stalled_ms"] for event in events if event["event"] == "regrouped"]

        wait_for(out, lambda events: len(regrouped(events)) == 1)
        for number in range(times):
            time.sleep(1.0)  # so that it is at work when it is struck
            before = len(regrouped(read(out)))
            on.signal(f"b{number}")
            events = wait_for(out, lambda events, n=before: len(regrouped(events)) > n)  # type: ignore[misc]
            found["died"].append(regrouped(events)[-1])
            before = len(regrouped(events))
            on.start(f"b{number + 1}", 1)
            events = wait_for(out, lambda events, n=before: len(regrouped(events)) > n)  # type: ignore[misc]
            found["joined"].append(regrouped(events)[-1])
        run.stop()
        with contextlib.suppress(lockstep.errors.StoppedError):
            run.result(WAIT)
        on.wait()
    return found


def main() -> int:
    """Measure as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    found = measure(args.times)
    lines = [
        "| | median, ms | most, ms | bar, ms |",
        "|---|---|---|---|",
    ]
    for what, bar, key in (
        ("a host is killed: to the next committed step", 1000, "died"),
        ("a host with a state of 100 MB joins: training stalls", 500, "joined"),
    ):
        values = found[key]
        lines.append(f"| {what} | {statistics.median(values):.0f} | {max(values):.0f} | {bar} |")
    print("\n".join(lines))
    if args.write:
        args.write.write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
