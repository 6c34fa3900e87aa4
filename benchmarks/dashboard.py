"""Dashboard: what the events and the page cost, how late an event is, how soon a long run opens.

    python -m benchmarks.dashboard --write docs/page-cost.md

Cost: one run, in parts of a second by turns: everything told (events of pace and times, a logger,
and the page's server with a client that follows it), and nothing. Lateness: a worker is killed, and
the stream is read until it says so. Opening: a run of a million steps, made up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import lockstep
from benchmarks.models import CASES, WORLD
from benchmarks.page_watcher import Watcher
from benchmarks.report import MODELS, publish, table
from benchmarks.tasks import Benchmark
from lockstep.agent.time_sampler import TimeSampler
from lockstep.errors import StoppedError
from lockstep.results.callbacks import CallbackThreads
from lockstep.results.ledger import Ledger, StepRecord
from lockstep.results.metering import Meter
from lockstep.results.recorder import Recorder
from lockstep.results.run_folder import Events, RunFolder
from lockstep.results.run_reader import RunReader

MILLION = 1_000_000
SLICE = 1.0
"""Seconds of a run in which everything is told, and then nothing, in turns."""


class Turns:
    """Parts of one run, by turns with and without events of pace and times, page and loggers.

    One run, since two runs of the same job differ by far more than what is looked for. The parts
    come as told, untold, untold, told, so that what drifts falls on both alike.
    """

    def __init__(self, watcher: Watcher, *, silent: bool = False) -> None:
        """`silent`: nothing is told in either part, which shows what the figures are worth."""
        self.watcher, self._silent = watcher, silent
        self._commits, self._began_with, self._begun, self._cpu = 0, 0, 0.0, 0.0
        self._part = -4  # the first ones are the start, and are not counted
        self.rates: dict[bool, list[float]] = {True: [], False: []}
        """Steps per second of the parts, by whether they were told."""
        self.shares: dict[bool, list[float]] = {True: [], False: []}
        """What the coordinator took of a core, likewise."""

    @property
    def _first(self) -> bool:
        return self._part % 4 in (0, 3)

    @property
    def telling(self) -> bool:
        return self._first and (self._part < 0 or not self._silent)

    def commit(self) -> None:
        """A step is committed; the turn may end with it."""
        self._commits += 1
        now = time.monotonic()
        if now - self._begun < SLICE:
            return
        if self._part >= 0:
            seconds = now - self._begun
            self.rates[self._first].append((self._commits - self._began_with) / seconds)
            self.shares[self._first].append((time.process_time() - self._cpu) / seconds)
        self._part += 1
        self._begun, self._began_with, self._cpu = now, self._commits, time.process_time()
        self.watcher.process.send_signal(signal.SIGCONT if self.telling else signal.SIGSTOP)

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """While in force, a run of this process goes by turns."""
        commit = Recorder.commit

        def counted(recorder: Recorder, record: StepRecord) -> None:
            commit(recorder, record)
            self.commit()

        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(Recorder, "commit", counted))
            for owner, name in (
                (TimeSampler, "look"), (Meter, "commit"), (Meter, "look"),
                (CallbackThreads, "step"), (CallbackThreads, "event"),
            ):  # fmt: skip
                stack.enter_context(mock.patch.object(owner, name, self._only_told(owner, name)))
            try:
                yield
            finally:
                self.watcher.process.send_signal(signal.SIGCONT)

    def _only_told(self, owner: type, name: str) -> Callable[..., None]:
        method = getattr(owner, name)

        def call(*args: Any) -> None:
            if self.telling:
                method(*args)

        return call

    def ratios(self) -> list[float]:
        """The pace of each told part over that of the untold one beside it."""
        return [a / b for a, b in zip(self.rates[True], self.rates[False], strict=False)]

    def more_of_a_core(self) -> float:
        """What the coordinator takes more while everything is told."""
        return statistics.mean(self.shares[True]) - statistics.mean(self.shares[False])


def median_range(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """Where the median lies with 95 of 100, by drawing from the values again (the bootstrap)."""
    generator = random.Random(0)
    medians = sorted(
        statistics.median(generator.choices(values, k=len(values))) for _ in range(draws)
    )
    return medians[draws // 40], medians[-draws // 40]


def cost(name: str, seconds: float, log: list[str], place: Path) -> list[list[str]]:
    """Rows: the pace of a run while everything is told, over its pace while nothing is; and the
    same run with nothing told at all."""
    rows = []
    for silent in (False, True):
        with contextlib.closing(Watcher(place)) as watcher:
            turns = Turns(watcher, silent=silent)
            run_for(name, seconds, [] if silent else log, turns, place / f"run{silent:d}")
            # Without its start; and the other half of the time it was stopped.
            served = (watcher.cpu_seconds() - watcher.started_after) / (seconds / 2)
        rows.append([f"{name}, silent" if silent else name, *_figures(turns), _percent(served)])
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _figures(turns: Turns) -> list[str]:
    ratios = turns.ratios()
    low, high = median_range(ratios)
    return [
        f"{statistics.median(turns.rates[True]):,.0f}", f"{statistics.median(ratios):.3f}",
        f"{low:.3f} to {high:.3f}", str(len(ratios)), _percent(turns.more_of_a_core()),
    ]  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def run_for(name: str, seconds: float, log: list[str], turns: Turns, out: Path) -> None:
    """Train for so many seconds by turns, while a client follows the page's stream."""
    with turns.taken():
        run = lockstep.start(
            Benchmark(name), workers=WORLD, shards=WORLD, threads=1, evaluate=False, quiet=True,
            batch_size=CASES[name].batch * WORLD, steps=100 * MILLION, log=log, out=str(out),
        )  # fmt: skip
        try:
            with turns.watcher.client(out.name):
                time.sleep(seconds)
        finally:
            run.stop()
            with contextlib.suppress(StoppedError):
                run.result(60)


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


def page(costs: list[list[str]], late: list[float], opened: list[list[str]], loggers: str) -> str:
    """The figures in Markdown."""
    head = [
        "model", "steps/s", "told / untold, median", "95 of 100", "pairs",
        "coordinator, more of a core", "server, of a core",
    ]  # fmt: skip
    return f"""<!-- Written by benchmarks/dashboard.py; do not edit. -->
# What the events and the page cost

One run on two workers of one thread, in parts of a second by turns: everything told (the events of
pace and times, the logger {loggers}, the page's server with a client that follows it), and
nothing told. The pace of each told part is divided by that of the untold one beside it; the range
is that of the median, by the bootstrap. "Silent" is the same with nothing told in either part: how
far its ratio is from 1 is what a ratio of the row above can be wrong by. The last two columns are
processor time, which differs less from one second to the next: the workers' two cores have so much
less. To measure again, on a machine that does nothing else:
`python -m benchmarks.dashboard --write docs/page-cost.md`.

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
    parser.add_argument("--seconds", type=float, default=240.0, help="of a run")
    parser.add_argument("--log", nargs="*", default=["tensorboard"], help="loggers")
    parser.add_argument("--only-cost", action="store_true")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lockstep-dashboard-") as folder:
        costs = []
        for name in options.models:
            costs += cost(name, options.seconds, options.log, Path(folder, name))
        if options.only_cost:
            return 0
        opened = opening(Path(folder, "opening"))
        late = lateness(Path(folder, "late"), 10)
    loggers = " and ".join(options.log) or "none"
    publish(page(costs, late, opened, loggers), options.write)
    return 0


if __name__ == "__main__":
    sys.exit(main())
