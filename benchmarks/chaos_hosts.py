"""Chaos over several hosts: namespaces of this machine, harmed at random while they train a job.

    python -m benchmarks.chaos_hosts --faults 100 --seed 1 --write docs/chaos-hosts.md

Agents are killed, frozen and cut off, from all or from one, both ways or one way; links have a
delay; forkservers and workers are killed; disks are full and descriptors short; and some hosts are
harmful: they go mute, run out of memory in the exchange, or send random values inside valid
messages. Whatever happens, the fingerprint and the ledger have to be, to the byte, those of a run
on one host in which nothing did. A run whose master's disk was full is resumed, and one that does
not end is a failure. Needs root and iproute2; delays need a TUN device.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lockstep
from benchmarks import delays, namespaces
from benchmarks.host_harmer import DELAYED, MASTERS_DISK, NAMES, ChaosAgents, Harmer, disk_of
from benchmarks.namespaces import Network
from benchmarks.process import ROOT
from lockstep.errors import ResourceError
from tests.support.harmed_runs import events
from tests.support.tls_hosts import Cluster

RUN_SECONDS = 240.0
"""A run that takes longer hangs."""
TASK = f"{ROOT / 'tests/support/paced_task.py'}:Paced"
SETTINGS: dict[str, Any] = {
    "batch_size": 24, "shards": 6, "threads": 1, "seed": 5, "steps": 600,
}  # fmt: skip
LIMITS: dict[str, Any] = {"host_seconds": 2.0, "exchange_seconds": 3.0, "ship_code": True}
PACE = {"LOCKSTEP_TEST_PACE": "0.004"}
HOSTS = 1 + len(NAMES)
DISKS = {"master": "16m", **dict.fromkeys(NAMES, "1m")}
SLOW_RUNS = 3
"""One run of so many is on a network with delays: its packets pass through a process."""


@dataclass
class Tally:
    """What was done to all runs, and what came of it."""

    done: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    runs: int = 0
    resumed: int = 0
    events: Counter[str] = field(default_factory=Counter)
    """Of the runs, as their folders record them."""
    skipped: list[str] = field(default_factory=list)
    """Kinds of harm that this machine cannot do, and why."""


def one(given: Mapping[str, Any]) -> None:
    """A master, in the network's first namespace; prints what was done."""
    network = Network(HOSTS, given["network"], control=given["control"])
    folder, out = Path(given["folder"]), Path(given["out"])
    cluster = Cluster(folder)
    started = [on := ChaosAgents(cluster, dict.fromkeys(NAMES, 1), 1, network)]
    running = lockstep.start(
        TASK, on=on, workers=HOSTS, out=str(out), quiet=True, **SETTINGS, **LIMITS
    )
    harmer = Harmer(on, network, random.Random(given["seed"]), out, given["before"])
    resumed = 0
    try:
        harmer.harm(running)
        try:
            running.result()
        except ResourceError:
            if not harmer.done[MASTERS_DISK]:
                raise
            resumed = 1
            _end(on)
            started.append(ChaosAgents(cluster, dict.fromkeys(NAMES, 1), 1, network))
            lockstep.resume(out, on=started[-1], quiet=True)
    finally:
        for each in started:
            _end(each)
        print(json.dumps({"done": harmer.done, "resumed": resumed}))


def _end(on: ChaosAgents) -> None:
    for process in on.processes.values():
        process.kill()
        process.wait()


@contextlib.contextmanager
def disks(place: Path) -> Iterator[None]:
    """Small file systems for what each host writes."""
    mounted = []
    try:
        for name, size in DISKS.items():
            path = disk_of(place, name)
            path.mkdir(parents=True)
            command = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "lockstep"]
            subprocess.run([*command, path], check=True)
            mounted.append(path)
        yield
    finally:
        for path in mounted:
            subprocess.run(["umount", "-l", path], check=True)


def disturb(network: Network, place: Path, wanted: lockstep.Result, seed: int, tally: Tally) -> str:
    """One run; what is wrong with it."""
    out = disk_of(place, "master") / "run"
    given = {
        "network": network.name, "folder": str(place), "out": str(out), "seed": seed,
        "before": tally.done, "control": network.control,
    }  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.chaos_hosts", "--one", json.dumps(given)]
    child = subprocess.Popen(
        network.within(0, command), env={**os.environ, **PACE}, text=True, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        pass_fds=[] if network.control is None else [network.control],
    )  # fmt: skip
    tally.runs += 1
    try:
        said, errors = child.communicate(timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGABRT)
        child.communicate()
        return f"HANG: seed {seed}"
    if said:
        told = json.loads(said.splitlines()[-1])
        tally.done += Counter(told["done"])
        tally.resumed += told["resumed"]
    if child.returncode != 0:
        return f"seed {seed}: {errors[-2000:]}"
    if any("TypeError" in (place / f"{name}.log").read_text() for name in NAMES):
        return f"seed {seed}: a harmful host could not do what it should (benchmarks.harmful_hosts)"
    found = lockstep.Result.open(out)
    tally.events += Counter(event["event"] for event in events(out))
    same = found.fingerprint == wanted.fingerprint and _ledger(found) == _ledger(wanted)
    return "" if same else f"DIFFERENCE: seed {seed}"


def _ledger(result: lockstep.Result) -> bytes:
    return (result.folder / "ledger.jsonl").read_bytes()


def chaos(
    seed: int, faults: int, seconds: float, keep: Path | None = None, kinds: int = 0
) -> Tally:
    """Disturb runs until so many faults have struck, of so many kinds, or so many seconds have
    passed. What was wrong is kept in a folder of `keep`."""
    tally, begun = Tally(), time.monotonic()
    if why := delays.missing():
        tally.skipped.append(f"{DELAYED}: {why}")
    with tempfile.TemporaryDirectory(prefix="lockstep-chaos-") as folder:
        place = Path(folder)
        alone = {**SETTINGS, "out": place / "alone", "quiet": True}
        wanted = lockstep.run(TASK, workers=1, **alone)
        while (
            tally.done.total() < faults or len(tally.done) < kinds
        ) and time.monotonic() - begun < seconds:
            slow = not why and tally.runs % SLOW_RUNS == 1
            mine = place / f"{tally.runs}"
            with Network(HOSTS, delay=0.0 if slow else None) as network, disks(mine):
                problem = disturb(network, mine, wanted, seed + tally.runs, tally)
                if problem and keep is not None:
                    shutil.copytree(mine, keep / mine.name, dirs_exist_ok=True)
            tally.problems += [problem] if problem else []
            told = f"{tally.runs} runs, {tally.done.total()} faults, {len(tally.problems)} problems"
            print(*[problem] * bool(problem), told, sep="\n", file=sys.stderr, flush=True)
            if problem.startswith("HANG"):
                break
    return tally


def page(tally: Tally, seed: int, faults: int) -> str:
    """The tally in Markdown."""
    rows = [f"| {what} | {count} |" for what, count in sorted(tally.done.items())]
    skipped = [f"Skipped: {each}." for each in tally.skipped]
    problems = [f"- {each}" for each in tally.problems]
    return "\n".join(
        [
            "<!-- Written by benchmarks/chaos_hosts.py; do not edit. -->",
            "# Chaos over several hosts",
            "",
            "Four hosts, network namespaces of one machine, are harmed at random while they train",
            "a job. The fingerprint and the ledger have to be those of a run on one host in which",
            "nothing happened, byte for byte. To do it again: "
            f"`make chaos-hosts ARGS='--faults {faults} --seed {seed}'`",
            "(the moments depend on the machine).",
            "",
            f"**{tally.runs} runs, {tally.done.total()} faults, {len(tally.problems)} problems.** "
            f"{tally.resumed} runs ended because the master's disk was full, and were resumed.",
            f"{tally.events['host_lost']} times a host was lost; {tally.events['regrouped']} times "
            "the hosts were regrouped, because one was lost or came.",
            "",
            *skipped,
            *problems,
            *[""] * bool(skipped or problems),
            "| what | times |",
            "|---|---:|",
            *rows,
            "",
            "Hosts may be silent for 2 s, and exchange nothing for 3 s; they are frozen, cut off,",
            "parted, delayed and left without space or descriptors for shorter and for longer.",
            "",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--write", type=Path, help="the page to write")
    parser.add_argument("--keep", type=Path, help="a folder for runs that something is wrong with")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        one(json.loads(options.one))
        return 0
    if why := namespaces.missing():
        print(why, file=sys.stderr)
        return 2
    tally = chaos(options.seed, options.faults, options.minutes * 60, options.keep)
    text = page(tally, options.seed, options.faults)
    if options.write:
        options.write.write_text(text)
    print(text)
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
