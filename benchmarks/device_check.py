"""Device check: whether a GPU keeps the promise, in one script of at most six minutes, as one JSON.

    python -m benchmarks.device_check --out device.json
    python -m benchmarks.device_check --device cpu-apart     the same, on any machine

One fingerprint of each model for 1, 2 and 3 workers, through deaths and on a second run; what is
refused when memory is short; the speed beside the plain loop and beside DDP of one process; the
times of a context and of a replacement. Exits with 0 where all promises are kept.

It needs of torch what 2.11 has, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import lockstep
from benchmarks.device_tasks import CASES
from lockstep.errors import LockstepError, ResourceError
from lockstep.job.faults import Fault

SECONDS = 340
"""Nothing is begun after so many."""
SHARDS, BATCH = 4, 64
WORKERS = (1, 2, 3)
BALLAST_LEFT = 600 << 20
"""Bytes that are left of a GPU's memory for the run that is to be refused."""


class Check:
    """One machine's, on one device."""

    def __init__(self, device: str, steps: int, folder: Path, seconds: float) -> None:
        self.device, self.steps, self.folder = device, steps, folder
        self._until = time.monotonic() + seconds
        self._runs = 0
        self.left_out: list[str] = []
        self.profile: dict[str, Any] = {}

    def run(self, name: str, **settings: Any) -> lockstep.Result:
        """Train one of the models."""
        self._runs += 1
        kind, precision = CASES[name]
        given: dict[str, Any] = {
            "workers": 1, "shards": SHARDS, "threads": 1, "batch_size": BATCH, "seed": 1,
            "steps": self.steps, "precision": precision, "loaders": 0, "device": self.device,
            "experimental": self.device == "cuda", "out": str(self.folder / f"run-{self._runs}"),
            **settings,
        }  # fmt: skip
        result = lockstep.run(f"benchmarks.device_tasks:{kind}", quiet=True, **given)
        self.profile = json.loads((result.folder / "manifest.json").read_text())["profile"]
        return result

    def has_time(self, what: str) -> bool:
        """Whether there is time for this; if not, it is said to be left out."""
        if time.monotonic() < self._until:
            return True
        self.left_out.append(what)
        return False

    def fingerprints(self, name: str) -> dict[str, str]:
        """Those of a model, by how it was trained."""
        found = {}
        for workers in WORKERS:
            if self.has_time(f"{name} on {workers}"):
                found[f"{workers} workers"] = self.run(name, workers=workers).fingerprint
        if self.has_time(f"{name} again"):
            found["again"] = self.run(name).fingerprint
        return found

    def deaths(self, name: str) -> dict[str, Any]:
        """The same through kill -9, also of a worker that has a loader process."""
        found: dict[str, Any] = {}
        middle = self.steps // 2
        for phase, loaders in (("backward", 0), ("update_begin", 0), ("forward", 1)):
            label = f"killed in {phase}" + (", with a loader" if loaders else "")
            if not self.has_time(label):
                continue
            fault = Fault(worker_id=-1, step=middle, phase=phase)
            result = self.run(name, workers=2, loaders=loaders, faults=(fault,))
            found[label] = {
                "fingerprint": result.fingerprint,
                "deaths": len(result.recoveries),
                "recovery_ms": [recovery["recovery_ms"] for recovery in result.recoveries],
                "replacement_ms": _replacement_ms(result.folder),
            }
        return found

    def short_of_memory(self) -> str:
        """What becomes of a run where another process has nearly all of the GPU's memory."""
        if self.device != "cuda" or not self.has_time("short of memory"):
            return "not tried"
        with _ballast():
            try:
                self.run("cnn", batch_size=512)
            except ResourceError as error:
                return f"refused: {error.what}"
            except LockstepError as error:
                return f"ended otherwise: {error.what}"
        return "ran"

    def speed(self, name: str) -> dict[str, float]:
        """Samples per second: ours on one worker, the plain loop's, DDP's of one process."""
        found = {}
        if self.has_time("speed"):
            found["lockstep"] = round(self.run(name, steps=4 * self.steps).samples_per_second, 1)
            for other in ("plain", "ddp"):
                found[other] = _ask("speed", self.device, name, other, str(4 * self.steps))
        return found


def _replacement_ms(folder: Path) -> float | None:
    """From the fork of the worker that replaces one to when it is ready."""
    lines = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    events = [event for event in lines if event["event"] in ("spawned", "joined")]
    spawned = [event for event in events if event["event"] == "spawned"][-1]
    ready = [event for event in events if event["event"] == "joined"][-1]
    if ready["worker"] != spawned["worker"]:  # the run ended before it was
        return None
    taken = datetime.fromisoformat(ready["time"]) - datetime.fromisoformat(spawned["time"])
    return round(1000 * taken.total_seconds(), 1)


def _ask(*arguments: str) -> float:
    """A number from `benchmarks.device_plain`, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.device_plain", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(ended.stdout.split()[-1])


@contextlib.contextmanager
def _ballast() -> Iterator[None]:
    """Another process that has all of the GPU's memory but a little."""
    command = [sys.executable, "-m", "benchmarks.device_plain", "ballast", str(BALLAST_LEFT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()  # it has it
        try:
            yield
        finally:
            process.stdin.close()
            process.wait()


def check(device: str, names: list[str], steps: int, seconds: float) -> dict[str, Any]:
    """All of it; `kept` says whether every promise was."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        tool = Check(device, steps, Path(folder), seconds)
        context = _ask("context", device)
        prints = {name: tool.fingerprints(name) for name in names}
        deaths = tool.deaths(names[0])
        memory = tool.short_of_memory()
        speed = tool.speed(names[0])
        same = {name: len(set(found.values())) == 1 for name, found in prints.items()}
        wanted = set(prints[names[0]].values())
        died = {each["fingerprint"] for each in deaths.values()}
        struck = all(each["deaths"] for each in deaths.values())
        promises = {
            "one fingerprint for any number of workers, and again": all(same.values()),
            "the same through deaths": died <= wanted and struck,
            "short of memory: refused": memory == "not tried" or memory.startswith("refused"),
        }
        return {
            "device": device,
            "profile": tool.profile,
            "kept": all(promises.values()) and not tool.left_out,
            "promises": promises,
            "fingerprints": prints,
            "deaths": deaths,
            "short_of_memory": memory,
            "samples_per_second": speed,
            "context_seconds": context,
            "left_out": tool.left_out,
            "seconds": round(time.monotonic() - begun, 1),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu-apart"))
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.device == "cuda":
        try:
            _ask("context", "cuda")
        except subprocess.CalledProcessError as error:
            why = (error.stderr.strip() or "no answer").splitlines()[-1]
            print(f"device-check: no GPU that torch can use here: {why}", file=sys.stderr)
            return 1
    found = check(given.device, given.models, given.steps, given.seconds)
    text = json.dumps(found, indent=2)
    print(text)
    if given.out is not None:
        given.out.write_text(text + "\n")
    return 0 if found["kept"] else 2


if __name__ == "__main__":
    sys.exit(main())
