"""Chaos: random faults, from inside and from outside; each run is compared with an undisturbed one.

    python -m benchmarks.chaos --faults 200 --seed 1
    python -m benchmarks.chaos --minutes 10 --write docs/chaos.md

Whatever happens, the fingerprint and the ledger have to be, to the byte, those of the run in which
nothing did, and nothing may be left behind. A run that does not end is a failure, and ends this.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lockstep
from benchmarks.harm import (
    SCENARIOS,
    Meddler,
    Scenario,
    Watchdog,
    draw_faults,
    live_workers,
    read_events,
    send,
)
from benchmarks.process import adopt_orphans, descendants
from lockstep.errors import LockstepError, StoppedError, WorkerLostError
from lockstep.job.faults import AROUND, PHASES

STALL_SECONDS = 1.0
GRACE_SECONDS = 5.0
RUN_SECONDS = 180.0
"""A run that takes longer hangs."""
MASTERS = "the master and the forkserver"
"""The name of the runs whose masters are killed; the others' are those of `SCENARIOS`."""
PACED = f"{Path(__file__).parent.parent / 'tests' / 'support' / 'paced_task.py'}:Paced"


@dataclass
class Tally:
    """What has happened so far."""

    scripted: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By phase and kind."""
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    """From outside: to whom, what."""
    runs: Counter[str] = field(default_factory=Counter)
    recoveries: int = 0
    problems: list[str] = field(default_factory=list)
    """Differences, errors, and what was left behind."""
    others: frozenset[int] = field(default_factory=lambda: frozenset(descendants(os.getpid())))
    """Processes below this one that were there before."""

    @property
    def faults(self) -> int:
        """Scripted faults that fired, and signals; requests do not count."""
        signals = sum(count for (_, what), count in self.sent.items() if what.startswith("SIG"))
        return sum(self.scripted.values()) + signals

    def left(self) -> set[int]:
        """Processes below this one that were not there before, and do not end in a moment: loader
        processes end just after their worker."""
        limit = time.monotonic() + GRACE_SECONDS
        while (found := set(descendants(os.getpid())) - self.others) and time.monotonic() < limit:
            time.sleep(0.02)
        return found


def settings_of(scenario: Scenario, out: Path) -> dict[str, Any]:
    return {"threads": 1, "out": str(out), "quiet": True, **scenario.settings}


def disturb(
    name: str, wanted: lockstep.Result, out: Path, rng: random.Random, tally: Tally
) -> None:
    """One disturbed run, and its comparison."""
    scenario = SCENARIOS[name]
    workers = rng.randint(*scenario.workers)
    most = min(scenario.settings["shards"], workers + 1)
    faults = draw_faults(rng, scenario, workers)
    descriptors = len(os.listdir("/proc/self/fd"))
    running = lockstep.start(
        scenario.task,
        workers=workers,
        max_workers=most,
        stall_seconds=STALL_SECONDS,
        faults=faults,
        **settings_of(scenario, out),
    )
    meddler = Meddler(running, out, rng, most)
    with Watchdog(RUN_SECONDS, lambda: hung(f"{name}, {workers} workers, {faults}")):
        meddler.meddle()
        try:
            result = running.result()
        except LockstepError as error:
            tally.problems.append(f"{name}: {error}; {workers} workers, {faults}")
            return
        finally:
            tally.runs[name] += 1
            tally.sent += meddler.done
    (struck,) = [event["fired"] for event in read_events(out) if event["event"] == "faults"]
    for fault, times in zip(faults, struck, strict=True):
        tally.scripted[fault.phase, fault.kind] += times
    tally.recoveries += len(result.recoveries)
    compare(name, result, wanted, tally, f"{workers} workers, {faults}, {meddler.done}")
    left = tally.left()
    if left or len(os.listdir("/proc/self/fd")) > descriptors:
        tally.problems.append(f"{name}: left processes {left} or descriptors behind")


def disturb_masters(wanted: lockstep.Result, out: Path, rng: random.Random, tally: Tally) -> None:
    """A run whose master or forkserver is killed repeatedly, and that is resumed each time."""
    command = [
        "run",
        PACED,
        "--workers=2",
        "--checkpoint-steps=4",
        *paced_options(),
        f"--out={out}",
    ]
    tally.runs[MASTERS] += 1
    for _ in range(rng.randint(1, 3)):
        master = subprocess.Popen(
            [sys.executable, "-m", "lockstep", *command, "--quiet"],
            env={**os.environ, "LOCKSTEP_TEST_PACE": "0.01"},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        with Watchdog(RUN_SECONDS, lambda: hung(MASTERS)):
            end_master(master, out, rng, tally)
        left = tally.left()
        if left:
            tally.problems.append(f"{MASTERS}: left processes {left} behind")
        if not (out / "manifest.json").exists():
            return  # killed before there was a run
        if (out / "result.json").exists():
            break
        command = ["resume", str(out), f"--workers={rng.randint(1, 4)}"]
    if (out / "result.json").exists():
        result = lockstep.Result.open(out)
    else:
        with Watchdog(RUN_SECONDS, lambda: hung(f"{MASTERS}: the last resumption")):
            result = lockstep.resume(out, workers=rng.randint(1, 4), quiet=True)
    compare(MASTERS, result, wanted, tally, "")


def paced_options() -> list[str]:
    return ["--steps=120", "--batch-size=24", "--shards=4", "--threads=1", "--seed=5"]


def end_master(
    master: subprocess.Popen[bytes], out: Path, rng: random.Random, tally: Tally
) -> None:
    """Kill a master, or its forkserver, at a random moment, and see it end."""
    before = sum(event["event"] == "formed" for event in read_events(out))
    while master.poll() is None:
        if sum(event["event"] == "formed" for event in read_events(out)) > before:
            break
        time.sleep(0.01)
    try:
        master.wait(rng.uniform(0.0, 1.5))
    except subprocess.TimeoutExpired:
        whom = rng.choice(("the master", "the master", "the forkserver"))
        number = signal.SIGKILL
        if whom == "the forkserver":
            pids = [pid for pid in descendants(master.pid) if pid not in live_workers(out)][:1]
        else:
            pids = [master.pid]
            number = rng.choice((signal.SIGKILL, signal.SIGTERM))
        tally.sent[whom, number.name] += sum(send(pid, number) for pid in pids)
    code = master.wait()
    expected = (-signal.SIGKILL, StoppedError.exit_code, WorkerLostError.exit_code, 0)
    finished = (out / "result.json").exists()  # and signals mean again what they do elsewhere
    if code not in expected and not (finished and code == -signal.SIGTERM):
        tally.problems.append(f"{MASTERS}: exit code {code}")


def compare(
    name: str, found: lockstep.Result, wanted: lockstep.Result, tally: Tally, how: str
) -> None:
    """Note whether a run differs from the undisturbed one."""
    same = (
        found.fingerprint == wanted.fingerprint
        and ledger(found) == ledger(wanted)
        and found.history == wanted.history
    )
    if not same:
        tally.problems.append(f"DIFFERENCE: {name}, {found.folder}: {how}")


def ledger(result: lockstep.Result) -> bytes:
    return (result.folder / "ledger.jsonl").read_bytes()


def hung(what: str) -> None:
    """End the process: a run that does not end by itself is what must not happen."""
    print(f"HANG: {what}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback()
    os.kill(os.getpid(), signal.SIGKILL)


def chaos(
    seed: int, faults: int, seconds: float, names: Sequence[str] = (), loud: bool = True
) -> Tally:
    """Disturb runs until so many faults have struck, or so many seconds have passed."""
    rng, tally, begun = random.Random(seed), Tally(), time.monotonic()
    names, told = names or [*SCENARIOS, MASTERS], 0
    with tempfile.TemporaryDirectory(prefix="lockstep-chaos-") as folder:
        place, wanted = Path(folder), {}
        for number, name in enumerate(names):
            out = place / f"undisturbed-{number}"
            wanted[name] = undisturbed(name, out)
        while tally.faults < faults and time.monotonic() - begun < seconds:
            count = sum(tally.runs.values())
            name, out = names[count % len(names)], place / f"run-{count}"
            if name == MASTERS:
                disturb_masters(wanted[name], out, rng, tally)
            else:
                disturb(name, wanted[name], out, rng, tally)
            if loud:
                new, told = tally.problems[told:], len(tally.problems)
                print(*new, summary(tally), sep="\n", file=sys.stderr, flush=True)
    return tally


def undisturbed(name: str, out: Path) -> lockstep.Result:
    """The run that all others are compared with."""
    if name == MASTERS:
        options = [option[2:].replace("-", "_").split("=") for option in paced_options()]
        settings: dict[str, Any] = {key: int(value) for key, value in options}
        return lockstep.run(PACED, workers=1, out=str(out), quiet=True, **settings)
    return lockstep.run(SCENARIOS[name].task, workers=1, **settings_of(SCENARIOS[name], out))


def summary(tally: Tally) -> str:
    return (
        f"{sum(tally.runs.values())} runs, {tally.faults} faults, {tally.recoveries} recoveries, "
        f"{len(tally.problems)} problems"
    )


def page(tally: Tally, seed: int) -> str:
    """The tally in Markdown."""
    kinds = sorted({kind for _, kind in tally.scripted})
    rows = [
        f"| {phase} | "
        + " | ".join(str(tally.scripted[phase, kind] or "") for kind in kinds)
        + f" | {sum(tally.scripted[phase, kind] for kind in kinds)} |"
        for phase in (*AROUND, *PHASES)
    ]
    outside = [
        f"| {whom} | {what} | {count} |" for (whom, what), count in sorted(tally.sent.items())
    ]
    runs = [f"| {name} | {count} |" for name, count in sorted(tally.runs.items())]
    return "\n".join(
        [
            "<!-- Written by benchmarks/chaos.py; do not edit. -->",
            "# Chaos\n",
            "Runs are harmed at random and compared with undisturbed runs of the same job on one "
            "worker:",
            "the fingerprint, the ledger and the metrics have to be the same bytes, and no process "
            "or descriptor may be left.",
            f"To do it again: `python -m benchmarks.chaos --faults {tally.faults} --seed {seed} "
            "--write docs/chaos.md`\n(the moments of the signals depend on the machine).\n",
            f"**{summary(tally)}, no hang.**\n",
            "## Scripted: where a worker harmed itself, and how\n",
            f"| phase | {' | '.join(kinds)} | all |\n|---|{'---:|' * (len(kinds) + 1)}",
            *rows,
            "\n`start`: before the worker reports that it is ready; "
            "`join`: when it becomes a member.",
            "`stop` is SIGSTOP, `loop` an endless loop: the timeout "
            f"({STALL_SECONDS} s here) finds them. `flip` is a bit of a gradient: found by "
            "the audit.\n",
            "## From outside, at random moments\n",
            "| to | what | times |\n|---|---|---:|",
            *outside,
            "\nRequests (`scale`, `pause`, `checkpoint`) are not counted as faults. A master that",
            "is killed is followed by `lockstep resume` on another number of workers.\n",
            "## Runs\n",
            "| job | runs |\n|---|---:|",
            *runs,
        ]
    ) + "\n"  # fmt: skip


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--only", action="append", default=[], help="jobs, by name")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    adopt_orphans()
    tally = chaos(options.seed, options.faults, options.minutes * 60, options.only)
    text = page(tally, options.seed)
    print(text)
    if options.write and not tally.problems:
        options.write.write_text(text)
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
