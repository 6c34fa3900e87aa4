"""Placements: one job on four workers, on one to four hosts, one of them killed: one fingerprint.

    python -m benchmarks.placements

The CNN of the benchmark, on loopback. The host is killed (SIGKILL) in the exchange.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lockstep.job.faults import Fault

STEPS, SHARDS = 24, 4
PLACEMENTS: dict[str, tuple[int, dict[str, int]]] = {
    "2 x 2": (2, {"b": 2}),
    "2 + 1 + 1": (2, {"b": 1, "c": 1}),
    "4 x 1": (1, {"b": 1, "c": 1, "d": 1}),
}
"""The workers of the master's own host, and of the others."""
KINDS: dict[str, dict[str, Any]] = {
    "replicated": {},
    "sharded": {"ownership": "sharded"},
    "servers": {"ownership": "servers", "servers": ["b"]},
}
SETTINGS: dict[str, Any] = {
    "args": {"name": "cnn"}, "steps": STEPS, "shards": SHARDS, "batch_size": 64, "threads": 1,
    "seed": 0, "evaluate": False, "quiet": True,
}  # fmt: skip
TASK = "benchmarks.tasks:Benchmark"


def on_hosts(folder: Path, here: int, others: Mapping[str, int], changes: Mapping[str, Any]) -> Any:
    """A run on several hosts, of which the last is killed; its result."""
    import lockstep
    from tests.support.agents_on_loopback import Agents
    from tests.support.tls_hosts import Cluster

    folder.mkdir()
    agents = Agents(Cluster(folder), others, here)
    killed = list(others)[-1]
    fault = Fault(worker_id=0, host=killed, step=STEPS // 2, phase="exchange", kind="host")
    workers = here + sum(n for name, n in others.items() if name not in changes.get("servers", ()))
    try:
        return lockstep.run(
            TASK, on=agents, workers=workers, faults=(fault,), out=str(folder / "run"),
            **SETTINGS, **changes,
        )  # fmt: skip
    finally:
        agents.wait()


def losses(folder: Path) -> list[str]:
    """The hosts that a run has lost."""
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [e["host"] for e in map(json.loads, lines) if e["event"] == "host_lost"]


def main() -> int:
    """Run all, and print a table."""
    import lockstep

    print("| hosts | ownership | killed | fingerprint |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as name:
        root = Path(name)
        alone = lockstep.run(TASK, workers=4, out=str(root / "alone"), **SETTINGS).fingerprint
        print(f"| 1 x 4 | | | `{alone}` |", flush=True)
        found = {alone}
        for number, ((label, (here, others)), (kind, changes)) in enumerate(
            (placement, kind) for placement in PLACEMENTS.items() for kind in KINDS.items()
        ):
            result = on_hosts(root / str(number), here, others, changes)
            killed = ", ".join(losses(result.folder)) or "nobody"
            found.add(result.fingerprint)
            print(f"| {label} | {kind} | {killed} | `{result.fingerprint}` |", flush=True)
    return 0 if len(found) == 1 else 1


if __name__ == "__main__":
    sys.exit(main())
