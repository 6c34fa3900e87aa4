"""Chaos over several hosts: namespaces of this machine, harmed at random while they train a job.

    python -m benchmarks.chaos_hosts --faults 100 --seed 1

Agents are killed, frozen and cut off, forkservers and workers are killed, and some hosts are
harmful: they go mute, run out of memory in the exchange, or send random values inside valid
messages. Whatever happens, the fingerprint and the ledger have to be, to the byte, those of a run
on one host in which nothing did. A run that does not end is a failure. Needs root and iproute2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lockstep
from benchmarks import namespaces
from benchmarks.namespaces import Network
from benchmarks.process import descendants
from tests.support.agents_on_loopback import Agents
from tests.support.tls_hosts import Cluster

RUN_SECONDS = 240.0
"""A run that takes longer hangs."""
NAMES = ("b", "c", "d")
TASK = "tests.support.paced_task:Paced"
SETTINGS: dict[str, Any] = {
    "batch_size": 24, "shards": 6, "threads": 1, "seed": 5, "steps": 600,
}  # fmt: skip
LIMITS: dict[str, Any] = {"host_seconds": 2.0, "exchange_seconds": 3.0}
PACE = {"LOCKSTEP_TEST_PACE": "0.004"}
HARMS = {
    "a host that goes mute": """
from lockstep.collectives import exchange_thread as e
exchange, begun = e.ExchangeThread._exchange, []
def mute(self, step):
    begun.append(step)
    if len(begun) > 40:
        while not self._stop.wait(0.05):
            pass
        raise e.CalledOff
    exchange(self, step)
e.ExchangeThread._exchange = mute
""",
    "a host without memory": """
import random
from lockstep.collectives import exchange_thread as e
exchange = e.ExchangeThread._exchange
def fail(self, step):
    if random.random() < 0.02:
        raise MemoryError
    exchange(self, step)
e.ExchangeThread._exchange = fail
""",
    "a host that sends random values": """
import random
import msgspec
from lockstep.agent import host_messages as m
from lockstep.agent.regroup_messages import HostStatus
from lockstep.net.control_link import ControlLink
tell = ControlLink.tell
def number():
    return random.choice([0, 1, 2, random.randrange(50), random.randrange(1 << 20)])
def some():
    return random.choice([None, number(), float(number()), "x" * random.randrange(99), [], {}])
def step():
    return random.choice([None, number(), number() << 20])
def odd(message):
    change = {
        m.HostPaused: lambda: {"status": HostStatus(whole=step(), base=step())},
        m.ExchangeTrouble: lambda: {"other": random.choice(["", "b", "c", "d", "master", "e"])},
        m.HostReady: lambda: {"workers": 1 + number() % 65536},
        m.EventForwarded: lambda: {"fields": {"host": some(), "step": some(), "how": some()}},
        m.Recovered: lambda: {"recoveries": [{"step": some(), "how": some(), "x": some()}]},
    }.get(type(message))
    return message if change is None else msgspec.structs.replace(message, **change())
def send(self, peer, message):
    tell(self, peer, odd(message) if random.random() < 0.2 else message)
    if random.random() < 0.01:
        tell(self, peer, odd(m.ExchangeTrouble(generation=number(), other="", why="?")))
ControlLink.tell = send
""",
}
"""What a harmful host does, as code that its agent runs first (see `tests.support`)."""


class Harmer:
    """Harms the hosts of one run until it ends. In the process of the run's master."""

    def __init__(self, on: Agents, network: Network, rng: random.Random, out: Path) -> None:
        self.on, self.network, self.rng = on, network, rng
        self.ledger = out / "ledger.jsonl"
        self.done: Counter[str] = Counter()

    def harm(self, running: lockstep.Run) -> None:
        """Go on until the run ends. A run that loses a host before it has begun fails, and may."""
        while running.running:
            time.sleep(self.rng.uniform(0.1, 1.2))
            if not self._begun():
                continue
            name = self.rng.choice(NAMES)
            if self.on.processes[name].poll() is not None:
                self._start(name)
                continue
            kinds = (self._kill, self._freeze, self._cut, self._kill_below, self._kill_below)
            self.rng.choice(kinds)(name)

    def _begun(self) -> bool:
        """Whether a step has been made."""
        with contextlib.suppress(OSError):
            return len(self.ledger.read_bytes().splitlines()) > 3
        return False

    def _start(self, name: str) -> None:
        """A host comes back, perhaps as a harmful one."""
        what = self.rng.choice([None, None, *HARMS])
        self.done[what or ""] += what is not None
        self.on.start(name, 1, {"LOCKSTEP_TEST_HARM": HARMS[what] if what else ""})

    def _kill(self, name: str) -> None:
        self.on.signal(name)
        self.done["a host killed"] += 1

    def _freeze(self, name: str) -> None:
        """Shorter or longer than it may be silent for."""
        self.on.signal(name, signal.SIGSTOP)
        time.sleep(self.rng.choice((0.3, 1.0, 3.0)))
        self.on.signal(name, signal.SIGCONT)
        self.done["a host frozen"] += 1

    def _cut(self, name: str) -> None:
        """Nothing reaches a host, nor comes from it."""
        port = f"port{1 + NAMES.index(name)}"
        link = ["ip", "-n", f"{self.network.name}-bridge", "link", "set", port]
        subprocess.run([*link, "down"], check=True)
        time.sleep(self.rng.choice((0.3, 1.0, 4.0)))
        subprocess.run([*link, "up"], check=True)
        self.done["a host cut off"] += 1

    def _kill_below(self, name: str) -> None:
        """A forkserver, or a worker."""
        below = descendants(self.on.processes[name].pid)
        if below:
            place = self.rng.randrange(len(below))
            with contextlib.suppress(ProcessLookupError):
                os.kill(below[place], signal.SIGKILL)
                self.done["a forkserver killed" if place == 0 else "a worker killed"] += 1


def one(given: dict[str, Any]) -> None:
    """A master, in the network's first namespace; prints what was done."""
    network = Network(1 + len(NAMES), given["network"])
    on = Agents(Cluster(Path(given["folder"])), dict.fromkeys(NAMES, 1), 1, network)
    running = lockstep.start(
        TASK, on=on, workers=1 + len(NAMES), out=given["out"], quiet=True, **SETTINGS, **LIMITS
    )
    harmer = Harmer(on, network, random.Random(given["seed"]), Path(given["out"]))
    try:
        harmer.harm(running)
        running.result()
    finally:
        for process in on.processes.values():
            process.kill()
        print(json.dumps(harmer.done))


def disturb(
    network: Network, place: Path, wanted: lockstep.Result, seed: int
) -> tuple[Counter[str], str]:
    """One run; what was done to it, and what is wrong with it."""
    place.mkdir()
    given = {"network": network.name, "folder": str(place), "out": str(place / "run"), "seed": seed}
    command = [sys.executable, "-m", "benchmarks.chaos_hosts", "--one", json.dumps(given)]
    child = subprocess.Popen(
        network.within(0, command), env={**os.environ, **PACE}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        said, errors = child.communicate(timeout=RUN_SECONDS)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGABRT)
        child.communicate()
        return Counter(), f"HANG: seed {seed}, {place}"
    done = Counter(json.loads(said.splitlines()[-1])) if said else Counter[str]()
    if child.returncode != 0:
        return done, f"seed {seed}: {errors[-2000:]}"
    found = lockstep.Result.open(place / "run")
    same = found.fingerprint == wanted.fingerprint and _ledger(found) == _ledger(wanted)
    return done, "" if same else f"DIFFERENCE: seed {seed}, {found.folder}"


def _ledger(result: lockstep.Result) -> bytes:
    return (result.folder / "ledger.jsonl").read_bytes()


def chaos(seed: int, faults: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Disturb runs until so many faults have struck, or so many seconds have passed."""
    done, problems, begun = Counter[str](), list[str](), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lockstep-chaos-") as folder:
        place = Path(folder)
        alone = {**SETTINGS, "out": place / "alone", "quiet": True}
        wanted = lockstep.run(TASK, workers=1, **alone)
        runs = 0
        while done.total() < faults and time.monotonic() - begun < seconds:
            with Network(1 + len(NAMES)) as network:
                new, problem = disturb(network, place / f"{runs}", wanted, seed + runs)
            done, runs = done + new, runs + 1
            problems += [problem] if problem else []
            told = f"{runs} runs, {done.total()} faults, {len(problems)} problems"
            print(*[problem] * bool(problem), told, sep="\n", file=sys.stderr, flush=True)
            if problem.startswith("HANG"):
                break
    return done, problems


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        one(json.loads(options.one))
        return 0
    if why := namespaces.missing():
        print(why, file=sys.stderr)
        return 2
    done, problems = chaos(options.seed, options.faults, options.minutes * 60)
    for what, count in done.most_common():
        print(f"{count:>5}  {what}")
    print(f"{done.total():>5}  faults; problems: {len(problems)}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
