"""Host harmer: harms the hosts of one run at random. In the process of the run's master.

Each kind of harm comes as often as the others: it is drawn among those that came least.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import lockstep
from benchmarks.harmful_hosts import HARMS
from benchmarks.namespaces import Network
from benchmarks.process import descendants
from tests.support.agents_on_loopback import Agents

NAMES = ("b", "c", "d")
"""The hosts besides the master's, which is the first of the network."""
LONG = (0.3, 1.0, 4.0)
"""Seconds: shorter and longer than a host may be silent for."""
DELAYED = "a link with delay"
MASTERS_DISK = "the master's disk full"
KINDS = (
    "a host killed", "a host frozen", "a host cut off", "two hosts parted, one way",
    "two hosts parted, both ways", DELAYED, "a forkserver killed", "a worker killed",
    "a host's disk full", "an agent without descriptors", "a forkserver without descriptors",
    MASTERS_DISK,
)  # fmt: skip
"""Besides those of harmful hosts."""
FILLER = "filler"


class ChaosAgents(Agents):
    """Agents that keep what they write on a small disk of their own."""

    def disk(self, name: str) -> Path:
        return disk_of(self.cluster.folder, name)

    def code(self, name: str) -> Path:
        return self.disk(name) / "code"

    def start(self, name: str, workers: int, environment: Mapping[str, str] | None = None) -> None:
        super().start(name, workers, {"TMPDIR": str(self.disk(name)), **(environment or {})})


def disk_of(folder: Path, name: str) -> Path:
    """Where a host's disk is mounted."""
    return folder / f"{name}.disk"


class Harmer:
    """Harms the hosts of one run until it ends."""

    def __init__(
        self,
        on: ChaosAgents,
        network: Network,
        rng: random.Random,
        out: Path,
        before: Mapping[str, int],
    ) -> None:
        """`before`: how often each kind has come in earlier runs."""
        self.on, self.network, self.rng, self.out = on, network, rng, out
        self.done: Counter[str] = Counter()
        self._before = before
        harms = (
            self._kill, self._freeze, self._cut, self._part_one_way, self._part, self._delay,
            self._kill_forkserver, self._kill_worker, self._fill, self._lack, self._lack_below,
            self._fill_masters,
        )  # fmt: skip
        self._kinds: dict[str, Callable[[str], bool]] = {
            **dict(zip(KINDS, harms, strict=True)),
            **{what: self._become(what) for what in HARMS},
        }
        if network.control is None:
            del self._kinds[DELAYED]

    def harm(self, running: lockstep.Run) -> None:
        """Go on until the run ends. A run that loses a host before it has begun fails, and may."""
        while running.running:
            time.sleep(self.rng.uniform(0.1, 1.0))
            if not self._begun():
                continue
            self._revive()
            kind = self._least()
            if running.running and self._kinds[kind](self.rng.choice(NAMES)):
                self.done[kind] += 1

    def _least(self) -> str:
        """A kind that came least often."""
        count = {kind: self._before.get(kind, 0) + self.done[kind] for kind in self._kinds}
        return self.rng.choice([kind for kind in count if count[kind] == min(count.values())])

    def _begun(self) -> bool:
        """Whether a few steps have been made."""
        with contextlib.suppress(OSError):
            return len((self.out / "ledger.jsonl").read_bytes().splitlines()) > 3
        return False

    def _revive(self) -> None:
        """Some of those who are dead come back."""
        for name in NAMES:
            if self.on.processes[name].poll() is not None and self.rng.random() < 0.5:
                self._start(name)

    def _start(self, name: str, harm: str = "") -> None:
        with contextlib.suppress(OSError):  # such as no space for the folder of its code
            self.on.start(name, 1, {"LOCKSTEP_TEST_HARM": harm})

    # Each returns whether there was anything to harm.

    def _become(self, what: str) -> Callable[[str], bool]:
        def start(name: str) -> bool:
            self.on.signal(name)
            self.on.processes[name].wait()
            self._start(name, HARMS[what])
            return True

        return start

    def _kill(self, name: str) -> bool:
        if self.on.processes[name].poll() is not None:
            return False
        self.on.signal(name)
        return True

    def _freeze(self, name: str) -> bool:
        if self.on.processes[name].poll() is not None:
            return False
        self.on.signal(name, signal.SIGSTOP)
        time.sleep(self.rng.choice((0.3, 1.0, 3.0)))
        self.on.signal(name, signal.SIGCONT)
        return True

    def _cut(self, name: str) -> bool:
        """Nothing reaches a host, nor comes from it."""
        host = 1 + NAMES.index(name)
        self.network.cut(host)
        time.sleep(self.rng.choice(LONG))
        self.network.mend(host)
        return True

    def _part_one_way(self, name: str) -> bool:
        return self._drop(name, both=False)

    def _part(self, name: str) -> bool:
        return self._drop(name, both=True)

    def _drop(self, name: str, *, both: bool) -> bool:
        """What a host sends does not reach one of the others, perhaps the master; nor back."""
        host = 1 + NAMES.index(name)
        other = self.rng.choice([each for each in range(self.network.hosts) if each != host])
        ways = [(host, other), (other, host)]
        self.rng.shuffle(ways)
        ways = ways if both else ways[:1]
        for way in ways:
            self.network.drop(*way)
        time.sleep(self.rng.choice(LONG))
        for way in ways:
            self.network.let_through(*way)
        return True

    def _delay(self, name: str) -> bool:
        """Packets of a host take their time for a while; perhaps longer than it may be silent."""
        host, seconds = 1 + NAMES.index(name), self.rng.choice((0.02, 0.1, 1.5))
        self.network.delay(host, seconds, self.rng.choice((0.0, seconds)))
        time.sleep(self.rng.choice(LONG))
        self.network.delay(host, 0.0, 0.0)
        return True

    def _kill_forkserver(self, name: str) -> bool:
        return self._kill_one(descendants(self.on.processes[name].pid)[:1])

    def _kill_worker(self, name: str) -> bool:
        return self._kill_one(descendants(self.on.processes[name].pid)[1:])

    def _kill_one(self, pids: list[int]) -> bool:
        if not pids:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.rng.choice(pids), signal.SIGKILL)
        return True

    def _fill(self, name: str) -> bool:
        """A host's disk is full, for a host that runs or for one that starts."""
        starts = self.rng.random() < 0.5
        if starts:
            self.on.signal(name)
            self.on.processes[name].wait()
            shutil.rmtree(self.on.code(name), ignore_errors=True)  # else that would make room
        with filled(self.on.disk(name)):
            if starts:
                self._start(name)
            time.sleep(self.rng.choice(LONG))
        return True

    def _fill_masters(self, _: str) -> bool:
        """The run ends, if anything is to be written meanwhile, and is to be resumed."""
        with filled(self.out.parent):
            time.sleep(self.rng.choice(LONG))
        return True

    def _lack(self, name: str) -> bool:
        return self._limit([self.on.processes[name].pid])

    def _lack_below(self, name: str) -> bool:
        return self._limit(descendants(self.on.processes[name].pid)[:1])

    def _limit(self, pids: list[int]) -> bool:
        """A process may open no more descriptors for a while, or very few."""
        try:
            (pid,) = pids
            count = len(os.listdir(f"/proc/{pid}/fd")) + self.rng.choice((0, 0, 1, 3))
            before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (min(count, before[1]), before[1]))
            time.sleep(self.rng.choice(LONG))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        except (OSError, ValueError):  # it is dead, or dies
            return False
        return True


@contextlib.contextmanager
def filled(disk: Path) -> Iterator[None]:
    """Take all space of a small file system, for a while."""
    path, size = disk / FILLER, 1 << 20
    try:
        with open(path, "wb", buffering=0) as file:
            while size:
                try:
                    full = file.write(bytes(size)) < size
                except OSError:
                    full = True
                size = size // 2 if full else size
        yield
    finally:
        path.unlink(missing_ok=True)
