"""Run folders as a run leaves them, made without one: for what reads them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from lockstep.results.ledger import Ledger, StepRecord
from lockstep.system.processes import start_time

BEGUN = datetime(2026, 11, 1, 10, 0, 0, tzinfo=UTC)
HOSTILE = "<script>alert('x')</script>\"><img src=http://evil.example/x onerror=alert(1)>"


def at(seconds: float) -> str:
    return (BEGUN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def line(seconds: float, event: str, /, **fields: Any) -> dict[str, Any]:
    return {"time": at(seconds), "event": event, **fields}


def append(folder: Path, events: Iterable[dict[str, Any]]) -> None:
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def began(seconds: float = 0.0, **fields: Any) -> dict[str, Any]:
    """The first event of a run that this process leads."""
    master = {"pid": os.getpid(), "started": start_time(os.getpid()), "host": platform.node()}
    command = ["lockstep", "run", "mnist"]
    return line(seconds, "began", **{**master, "command": command, "parameters": 7850, **fields})


def workers(seconds: float, ids: Sequence[int], step: int = 0, host: str = "") -> list[Any]:
    """Workers are forked, join and go on together."""
    name = host or platform.node()
    told = {"host": host} if host else {}
    spawned = [line(seconds, "spawned", worker=n, pid=1000 + n, reason="", **told) for n in ids]
    joined = [line(seconds, "joined", host=name, worker=n, pid=1000 + n, probe="") for n in ids]
    return [*spawned, *joined, line(seconds + 0.1, "formed", seats=ids, step=step, **told)]


def pace(seconds: float, step: int, loss: float = 0.5, ids: Sequence[int] = (0, 1)) -> list[Any]:
    """Ten steps of a second."""
    rows = {str(n): [0.6, 0.05, 0.2, 0.05, 0.0, 0.1, 0.0] for n in ids}
    return [
        line(seconds, "progressed", step=step, steps=10, samples=640, seconds=1.0, loss=loss,
             low=loss - 0.1, high=loss + 0.1, workers=len(ids)),
        line(seconds, "timed", host=platform.node(), seconds=1.0, workers=rows),
    ]  # fmt: skip


def make_run(folder: Path, events: Iterable[dict[str, Any]] = (), **job: Any) -> Path:
    """A run folder with a manifest, and these events."""
    folder.mkdir(parents=True)
    plan = {"workers": 2, "shards": 4, "threads": 1, "seats": 4, "steps": 100, "numerics": "native"}
    manifest = {
        "name": "digits",
        "source": {"name": "mnist", "args": {"model": "cnn"}},
        "job": {"seed": 0, "batch_size": 64, "clip_grad_norm": None, **job},
        "plan": {**plan, "seed": job.get("seed", 0), "reasons": ["2 workers, as asked"]},
        "profile": {"torch": "2.13.0", "capability": "AVX512"},
        "versions": {"python": "3.11.7"},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    append(folder, events)
    return folder


def write_ledger(folder: Path, losses: Sequence[float], job: str = "ab", end: bool = True) -> Path:
    """A ledger of these losses, whole and chained."""
    path = folder / "ledger.jsonl"
    ledger = Ledger(path)
    ledger.begin(job, "cd")
    for step, loss in enumerate(losses):
        units = {f"w{step % 3}": f"{hash((step, loss)) & 0xFFFFFFFF:08x}"}
        ledger.commit(StepRecord(step=step, data_epoch=0, samples=64, loss=loss, units=units))
    if end:
        ledger.end(len(losses), "ef")
    ledger.flush()
    ledger.close()
    return path
