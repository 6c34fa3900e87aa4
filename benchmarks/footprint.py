"""What a run takes beside time per step: memory in steady state, and time to the first step."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from statistics import median

from benchmarks.process import ContenderFailed, descendants, finish, pss

IMPORT_TIMES = 7
COLD_TIMES = 5
LEAST_SAMPLES = 3
FIRST_STEP = "first_step"


class MemoryWatch:
    """Samples the PSS of a process and all below it, while `steady(output)` holds."""

    def __init__(self, steady: Callable[[str], bool]) -> None:
        self._steady = steady
        self._samples: dict[int, list[int]] = {}

    def __call__(self, pid: int, output: str) -> bool:
        """Sample once; always lets the process go on."""
        if self._steady(output):
            pids = [pid, *descendants(pid)]
            used = pss(pids)
            if used is not None:
                self._samples.setdefault(len(pids), []).append(used)
        return True

    def summary(self) -> dict[str, int]:
        """Of the samples with the most processes that were seen together `LEAST_SAMPLES` times:
        with fewer, some were still starting or had ended."""
        if not self._samples:
            raise ContenderFailed("it ended before its memory could be sampled")
        whole = [item for item in self._samples.items() if len(item[1]) >= LEAST_SAMPLES]
        processes, used = max(whole or self._samples.items())
        return {"median": int(median(used)), "greatest": max(used), "processes": processes}


def first_step_time(run: Path) -> float | None:
    """When a run committed its first step, in seconds since 1970; None: not yet."""
    try:
        lines = (run / "events.jsonl").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if FIRST_STEP not in line:
            continue
        try:
            event = json.loads(line)
        except ValueError:
            return None  # a line half written
        if event.get("event") == FIRST_STEP:
            return datetime.fromisoformat(event["time"]).timestamp()
    return None


def memory(contender: str, model: str, seconds: float, steps: int) -> dict[str, int]:
    """PSS of one contender in steady state: `median`, `greatest`, `processes`."""
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as folder:
        out = Path(folder) / "run"
        command = ["-m", "benchmarks.peers", contender, model]
        command += ["--seconds", str(seconds), "--steps", str(steps), "--out", str(out)]
        if contender in ("lockstep", "auto"):
            watch = MemoryWatch(lambda _: first_step_time(out) is not None)
        else:
            watch = MemoryWatch(lambda output: "steady" in output)
        finish(command, timeout=120, watch=watch, every=0.15)
        return watch.summary()


def idle_memory(seconds: float = 1.5) -> dict[str, int]:
    """PSS of one process that has only imported torch, and of two together."""
    used = {}
    for count in (1, 2):
        script = "import subprocess, sys; c = [sys.executable, '-m', 'benchmarks.peers', 'idle',"
        script += f" '--seconds', '{seconds}'];"
        script += f" p = [subprocess.Popen(c) for _ in range({count})]; [q.wait(60) for q in p]"
        samples: list[int] = []

        def watch(pid: int, output: str, count: int = count, to: list[int] = samples) -> bool:
            below = descendants(pid)  # without the starter, which has not imported torch
            used = pss(below)
            if output.count("steady") == count and len(below) == count and used is not None:
                to.append(used)
            return True

        finish(["-c", script], timeout=60, watch=watch)
        if not samples:
            raise ContenderFailed("the idle processes ended before they could be sampled")
        used[str(count)] = int(median(samples))
    return used


def imports(package: str, times: int = IMPORT_TIMES) -> list[float]:
    """Seconds that `import package` takes, in fresh processes; one more, before, fills caches."""
    script = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"
    return [
        float(finish(["-c", script.format(package)], timeout=60).output) for _ in range(times + 1)
    ][1:]


def first_steps(times: int = COLD_TIMES) -> list[float]:
    """Seconds from starting the command to the first committed step, in fresh processes."""
    return [_first_step() for _ in range(times + 1)][1:]


def _first_step() -> float:
    with tempfile.TemporaryDirectory(prefix="lockstep-bench-") as folder:
        out = Path(folder) / "run"
        command = ["-m", "lockstep", "run", "mnist", "--workers", "2", "--steps", "20"]
        began = time.time()
        finish([*command, "--out", str(out)], timeout=120)
        committed = first_step_time(out)
        if committed is None:
            raise ContenderFailed(f"no {FIRST_STEP} event in {out / 'events.jsonl'}")
        return committed - began
