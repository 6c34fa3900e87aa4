"""Dashboard: what the events and the page cost, how late an event is, how soon a long run opens.

    python -m benchmarks.dashboard --write docs/page-cost.md

Cost: the same steps in turns, with nobody told of the pace and the workers' times; told; and told
while a client follows the page's stream. Noise between runs is larger than the cost, so the
processor time of the coordinator and of the page's server is told beside it. Lateness: a worker is
killed, and the stream is read until it says so. Opening: a run of a million steps, made up.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

import lockstep
from benchmarks.models import CASES, WORLD
from benchmarks.report import MODELS, publish, table
from benchmarks.tasks import Benchmark
from lockstep.agent.time_sampler import TimeSampler
from lockstep.results.ledger import Ledger, StepRecord
from lockstep.results.metering import Meter
from lockstep.results.run_folder import Events, RunFolder
from lockstep.results.run_reader import RunReader

MILLION = 1_000_000
ARMS = ("untold", "told", "watched")
TICKS = os.sysconf("SC_CLK_TCK")


def _nothing(*_: object) -> None:
    return None


@contextlib.contextmanager
def untold() -> Iterator[None]:
    """Takes the pace and the times out of the coordinator."""
    with (
        mock.patch.object(TimeSampler, "look", _nothing),
        mock.patch.object(Meter, "commit", _nothing),
        mock.patch.object(Meter, "look", _nothing),
    ):
        yield


class Watcher:
    """The page's server over a folder, and a client that reads a run's stream."""

    def __init__(self, runs: Path) -> None:
        runs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "lockstep", "watch", str(runs)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        address = urlsplit(self.process.stdout.readline().split()[-1])
        self.address, self.token = address.netloc, address.fragment.partition("=")[2]

    def get(self, path: str) -> http.client.HTTPResponse:
        """An answer of the server."""
        connection = http.client.HTTPConnection(self.address, timeout=60)
        connection.request("GET", path, headers={"Authorization": f"Bearer {self.token}"})
        return connection.getresponse()

    def follow(self, name: str, seen: list[tuple[float, dict[str, Any]]]) -> None:
        """Read a run's stream to its end, from when the run is there."""
        for _ in range(600):
            answer = self.get(f"/api/runs/{name}/stream")
            if answer.status == 200:
                break
            time.sleep(0.1)
        with contextlib.suppress(OSError, http.client.HTTPException):
            while line := answer.readline():
                seen.append((time.time(), json.loads(line)))

    def cpu_seconds(self) -> float:
        """The processor time that the server has taken."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def rate(task: Benchmark, steps: int, out: Path) -> tuple[float, float]:
    """Samples per second of a run, and the coordinator's processor time for each of its seconds."""
    settings: dict[str, Any] = {
        "workers": WORLD, "shards": WORLD, "threads": 1, "evaluate": False, "quiet": True,
        "batch_size": CASES[task.name].batch * WORLD,
    }  # fmt: skip
    begun, computed = time.monotonic(), time.process_time()
    result = lockstep.run(task, steps=steps, out=str(out), **settings)
    spent = (time.process_time() - computed) / (time.monotonic() - begun)
    return result.samples_per_second, spent


def cost(name: str, seconds: float, repeats: int, place: Path) -> list[str]:
    """A row of ratios of runs in turns, and of processor time."""
    trial, _ = rate(Benchmark(name), 50, place / "trial")
    steps = max(50, int(trial * seconds / (CASES[name].batch * WORLD)))
    ratios: dict[str, list[float]] = {arm: [] for arm in ARMS}
    spent: dict[str, list[float]] = {arm: [] for arm in ARMS}
    served = []
    for number in range(repeats):
        rates = {}
        for arm in ARMS[number % 3 :] + ARMS[: number % 3]:
            with contextlib.ExitStack() as stack:
                folder = f"{number}-{arm}"
                if arm == "untold":
                    stack.enter_context(untold())
                if arm == "watched":
                    watcher = stack.enter_context(contextlib.closing(Watcher(place)))
                    thread = threading.Thread(target=watcher.follow, args=(folder, []), daemon=True)
                    thread.start()
                    before, begun = watcher.cpu_seconds(), time.monotonic()
                rates[arm], used = rate(Benchmark(name), steps, place / folder)
                if arm == "watched":
                    used_there = watcher.cpu_seconds() - before
                    served.append(used_there / (time.monotonic() - begun))
            spent[arm].append(used)
        for arm in ARMS:
            ratios[arm].append(rates[arm] / rates["untold"])
    middle = {arm: statistics.median(ratios[arm]) for arm in ARMS}
    spread = [f"{min(ratios[arm]):.3f} to {max(ratios[arm]):.3f}" for arm in ARMS[1:]]
    more = statistics.median(spent["told"]) - statistics.median(spent["untold"])
    return [
        name, f"{middle['told']:.3f}", spread[0], f"{middle['watched']:.3f}", spread[1],
        str(repeats), f"{100 * more:.2f} %", f"{100 * statistics.median(served):.2f} %",
    ]  # fmt: skip


def lateness(place: Path, times: int) -> list[float]:
    """Seconds from the kill of a worker to the stream's saying so."""
    out = place / "killed"
    watcher = Watcher(place)
    seen: list[tuple[float, dict[str, Any]]] = []
    task = Benchmark("cnn")
    run = lockstep.start(
        task, workers=WORLD, shards=WORLD, threads=1, evaluate=False, quiet=True, steps=MILLION,
        batch_size=CASES["cnn"].batch * WORLD, out=str(out),
    )  # fmt: skip
    found = []
    try:
        threading.Thread(target=watcher.follow, args=("killed", seen), daemon=True).start()
        reader = RunReader(out)
        for number in range(times):
            while True:  # until both work
                time.sleep(0.5)
                with contextlib.suppress(lockstep.LockstepError):
                    reader.refresh()
                    if len(reader.history.working) == WORLD:
                        break
            time.sleep(0.5 + 0.037 * number)
            pids = _pids(out)
            killed = time.time()
            os.kill(pids[1], signal.SIGKILL)
            time.sleep(1.5)
            found.append(min(at for at, message in seen if at > killed and _says_death(message)))
            found[-1] -= killed
            reader.refresh()
    finally:
        run.stop()
        with contextlib.suppress(lockstep.LockstepError):
            run.result(60)
        watcher.close()
    return found


def _pids(out: Path) -> dict[int, int]:
    events = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    return {event["worker"]: event["pid"] for event in events if event["event"] == "joined"}


def _says_death(message: dict[str, Any]) -> bool:
    return any(row[2] == "died" for row in message.get("rows", {}).get("events", []))


def make_long_run(folder: Path, workers: int = 8) -> None:
    """A run of a million steps in 28 hours on eight workers, as a run writes it."""
    folder.mkdir(parents=True)
    plan = {"workers": workers, "shards": 8, "threads": 1, "seats": 8, "steps": MILLION}
    manifest = {"name": "long", "plan": {**plan, "reasons": ["made up"]}, "job": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    now, run = [0.0], RunFolder(folder)
    times = {str(worker): [0.06, 0.005, 0.02, 0.005, 0.0, 0.01, 0.0] for worker in range(workers)}
    # The time of a line is that of its writing; here it is that of the run.
    with mock.patch("lockstep.results.run_folder.datetime", _Clock(now)):
        events, ledger = Events(run.events_path), Ledger(run.ledger_path)
        events.add("began", host="a", pid=1, started=1, command=["lockstep", "run", "long"])
        for worker in range(workers):
            events.add("joined", host="a", worker=worker, pid=worker)
        events.add("formed", host="a", seats=list(range(workers)), step=0)
        meter = Meter(run, events, clock=lambda: now[0])
        ledger.begin("ab", "cd")
        units = {f"layer.{index}.weight": f"{index:032x}" for index in range(4)}
        for step in range(MILLION):
            loss = 2.0 / (1 + step / 1000)
            record = StepRecord(step=step, data_epoch=0, samples=512, loss=loss, units=units)
            ledger.commit(record)
            meter.commit(record)
            now[0] += 0.1
            if step % 10 == 9:
                meter.timed({"host": "a", "seconds": 1.0, "workers": times})
                meter.look(workers)
            if step % 600 == 599:
                events.add("checkpoint", step=step, path="", seconds=0.01)
            if step % 10_000 == 9_999:
                events.add("evaluated", step=step, data_epoch=0, metrics={"accuracy": 0.9})
        meter.flush()
        meter.close()
        events.add("finished", steps=MILLION, fingerprint="ab" * 32)
        ledger.end(MILLION, "ef")
        ledger.close()


class _Clock:
    """Stands in for `datetime`: the time that it tells is that of the made-up run."""

    def __init__(self, now: list[float]) -> None:
        self._now = now

    def now(self, zone: Any) -> Any:
        from datetime import datetime

        return datetime.fromtimestamp(1.7e9 + self._now[0], zone)


def opening(place: Path) -> list[list[str]]:
    """Rows of how soon a run of a million steps is there."""
    folder = place / "long"
    make_long_run(folder)
    size = (folder / "events.jsonl").stat().st_size
    lines = len((folder / "events.jsonl").read_bytes().splitlines())
    rows = [["events.jsonl", f"{lines:,} lines, {size / 1e6:.1f} MB"]]
    watcher = Watcher(place)
    try:
        for what, path in (
            ("the list of runs", "/api/runs"),
            ("the run: the first line of its stream", "/api/runs/long/stream"),
            ("the same, for the next one who opens it", "/api/runs/long/stream"),
        ):
            begun = time.monotonic()
            answer = watcher.get(path)
            told = answer.readline() if path.endswith("stream") else answer.read()
            took = time.monotonic() - begun
            answer.close()
            rows.append([what, f"{took:.2f} s, {len(told) / 1e6:.2f} MB"])
        begun = time.monotonic()
        watcher.get("/api/compare?a=long&b=long").read()
        rows.append(["compared with itself, with its ledger", f"{time.monotonic() - begun:.2f} s"])
        if drawn := _drawn(watcher):
            rows.append(["in Chromium, until its curve is drawn", f"{drawn:.2f} s"])
    finally:
        watcher.close()
    begun = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "lockstep", "status", str(folder)], check=True, capture_output=True
    )
    rows.append(["lockstep status", f"{time.monotonic() - begun:.2f} s"])
    return rows


def _drawn(watcher: Watcher) -> float | None:
    """Seconds until a browser shows the run; None: there is no browser."""
    import shutil

    chromium = shutil.which("chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    if chromium is None:
        return None
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page()
        begun = time.monotonic()
        page.goto(f"http://{watcher.address}/run/long#token={watcher.token}")
        page.locator(".plot canvas").first.wait_for()
        page.locator(".timeline canvas").wait_for()
        took = time.monotonic() - begun
        browser.close()
    return took


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def page(costs: list[list[str]], late: list[float], opened: list[list[str]]) -> str:
    """The figures in Markdown."""
    head = [
        "model", "told / untold", "least to greatest", "watched / untold", "least to greatest",
        "runs each", "coordinator, more of a core", "server, of a core",
    ]  # fmt: skip
    return f"""<!-- Written by benchmarks/dashboard.py; do not edit. -->
# What the events and the page cost

Samples per second, the same steps in turns, on two workers of one thread: with the pace and the
workers' times told, and with a client that follows the page's stream, as shares of the same run
without them. The last two columns are processor time for each second of the run. To measure again,
on a machine that does nothing else: `python -m benchmarks.dashboard --write docs/page-cost.md`.

{table(head, costs)}

From the kill of a worker to the stream's saying so, {len(late)} times:
{_ms(statistics.median(late))} ({_ms(min(late))} to {_ms(max(late))}).

A run of a million steps in 28 hours, on eight workers:

{table(["what", ""], opened)}
"""


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["softmax", "mlp"], choices=list(MODELS))
    parser.add_argument("--seconds", type=float, default=4.0, help="of a run")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lockstep-dashboard-") as folder:
        opened = opening(Path(folder, "opening"))
        late = lateness(Path(folder, "late"), 10)
        costs = []
        for name in options.models:
            costs.append(cost(name, options.seconds, options.repeats, Path(folder, name)))
            print(" ".join(costs[-1]), file=sys.stderr, flush=True)
    publish(page(costs, late, opened), options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
