"""Several hosts on real networks: namespaces of this machine, joined by a bridge.

They need root and iproute2, and delays of packets a TUN device. Where these are missing the tests
are skipped, and say so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import delays, namespaces
from benchmarks.chaos_hosts import chaos
from benchmarks.namespaces import Network
from lockstep.results.result import Result
from tests.support.harmed_runs import Event, Yard, await_event, ledger, yard
from tests.support.paced_task import PACE

__all__ = ["yard"]  # a fixture

MISSING = namespaces.missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"no network namespaces: {MISSING}")

UNDELAYED = delays.missing()
delayed = pytest.mark.skipif(bool(UNDELAYED), reason=UNDELAYED)

WAIT = 90.0
SETTINGS: dict[str, Any] = {"batch_size": 24, "shards": 4, "threads": 1, "seed": 5}
TASK = "tests.support.paced_task:Paced"
MASTER = """
import json, sys
from pathlib import Path
import lockstep
from benchmarks.namespaces import Network
from tests.support.tls_hosts import Cluster
from tests.support.agents_on_loopback import Agents
given = json.loads(sys.argv[1])
network = Network(given["hosts"], given["network"])
others = {name: 1 for name in given["names"]}
on = Agents(Cluster(Path(given["folder"])), others, 1, network)
try:
    lockstep.run(given["task"], on=on, workers=given["hosts"], quiet=True, **given["settings"])
finally:
    print(json.dumps(on.wait()))
"""

ROUND_TRIP = """
import errno, socket, sys, time
least = float("inf")
for _ in range(3):
    with socket.socket() as sock:
        begun = time.monotonic()
        assert sock.connect_ex((sys.argv[1], 9)) == errno.ECONNREFUSED
        least = min(least, time.monotonic() - begun)
print(least)
"""
"""Nobody listens at that port, and the host says so: a round trip, and nothing else."""


class Run:
    """A master in the first namespace, and agents in the others."""

    def __init__(self, network: Network, yard: Yard, folder: Path, pace: float, **settings: Any):
        self.folder, self.network = yard.path(), network
        self.names = ["b", "c", "d"][: network.hosts - 1]
        given = {
            "hosts": network.hosts, "network": network.name, "names": self.names, "task": TASK,
            "folder": str(folder), "settings": {**SETTINGS, **settings, "out": self.folder},
        }  # fmt: skip
        self.process = subprocess.Popen(
            network.within(0, [sys.executable, "-c", MASTER, json.dumps(given)]),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, PACE: str(pace)},
        )

    def wait_for(self, wanted: Callable[[Event], bool], what: str) -> Event:
        def check_alive() -> None:
            if self.process.poll() is not None:
                raise AssertionError(f"the master has ended: {self.process.communicate()}")

        return await_event(self.folder, wanted, WAIT, what, check_alive)

    def await_step(self, step: int) -> None:
        self.wait_for(lambda e: e["event"] == "evaluated" and e["step"] >= step, f"step {step}")

    def await_loss(self) -> Event:
        return self.wait_for(lambda e: e["event"] == "host_lost", "the loss of a host")

    def end(self) -> tuple[int, str, str]:
        said, errors = self.process.communicate(timeout=WAIT)
        return self.process.returncode, said, errors


Start = Callable[..., Run]


@pytest.fixture
def start(yard: Yard, tmp_path: Path) -> Iterator[Start]:
    """Starts runs on networks; ends whatever is left of them."""
    runs: list[Run] = []

    def begin(network: Network, pace: float = 0.004, **settings: Any) -> Run:
        runs.append(Run(network, yard, tmp_path, pace, **settings))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.process.send_signal(signal.SIGKILL)
            run.process.communicate()


def assert_same_as(run: Run, wanted: Result) -> dict[str, Any]:
    """Returns the run's result."""
    code, said, errors = run.end()
    assert code == 0, errors
    assert ledger(run.folder) == ledger(wanted.folder)
    result: dict[str, Any] = json.loads((Path(run.folder) / "result.json").read_text())
    assert result["fingerprint"] == wanted.fingerprint, said
    return result


def round_trip(network: Network, host: int, peer: int) -> float:
    """Seconds to a peer and back."""
    command = network.within(host, [sys.executable, "-c", ROUND_TRIP, network.address(peer)])
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=WAIT)
    return float(done.stdout)


@pytest.mark.long
def test_a_host_is_cut_off(start: Start, yard: Yard) -> None:
    """On a slow link, in both directions at once: the others go on without it."""
    steps = 160
    with Network(3) as network:
        network.limit("50mbit")
        run = start(network, steps=steps, host_seconds=1.0)
        run.await_step(20)
        network.cut(2)
        lost = run.await_loss()
        assert lost["host"] == "c"
        assert_same_as(run, yard.undisturbed(TASK, **SETTINGS, steps=steps))


@pytest.mark.long
@pytest.mark.parametrize(("sender", "receiver"), [(1, 2), (2, 1)], ids=str)
def test_one_direction_between_two_hosts_is_cut(
    sender: int, receiver: int, start: Start, yard: Yard
) -> None:
    """Both reach the master, so it cannot tell at first; the second time one of them has to go."""
    steps = 160
    with Network(3) as network:
        run = start(network, steps=steps, host_seconds=1.0)
        run.await_step(20)
        network.drop(sender, receiver)
        assert run.await_loss()["host"] in ("b", "c")
        assert_same_as(run, yard.undisturbed(TASK, **SETTINGS, steps=steps))


@pytest.mark.long
@pytest.mark.parametrize(("sender", "receiver"), [(0, 1), (1, 0)], ids=str)
def test_one_direction_to_the_master_is_cut(
    sender: int, receiver: int, start: Start, yard: Yard
) -> None:
    steps = 160
    with Network(3) as network:
        run = start(network, steps=steps, host_seconds=1.0)
        run.await_step(20)
        network.drop(sender, receiver)
        assert run.await_loss()["host"] == "b"
        assert_same_as(run, yard.undisturbed(TASK, **SETTINGS, steps=steps))


@pytest.mark.long
def test_four_hosts_on_a_very_slow_link(start: Start, yard: Yard) -> None:
    with Network(4) as network:
        network.limit("2mbit")
        run = start(network, pace=0.0, steps=40)
        assert_same_as(run, yard.undisturbed(TASK, **SETTINGS, steps=40))


# Packets that take their time.


@delayed
def test_delays_are_real() -> None:
    with Network(2, delay=0.0) as network:
        assert round_trip(network, 0, 1) < 0.2  # or the machine is too slow to tell
        network.delay(1, 0.2, 0.0)
        assert round_trip(network, 0, 1) >= 0.2
        network.delay(1, 0.2, 0.1)
        assert min(round_trip(network, 0, 1), round_trip(network, 1, 0)) >= 0.3
        network.delay(1, 0.0, 0.0)
        assert round_trip(network, 0, 1) < 0.2


@pytest.mark.long
@delayed
@pytest.mark.parametrize(
    ("sending", "receiving"),
    [
        (0.04, 0.04),
        pytest.param(0.06, 0.0, marks=pytest.mark.long),
        pytest.param(0.0, 0.06, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_two_hosts_far_apart(sending: float, receiving: float, start: Start, yard: Yard) -> None:
    """Each step waits for a packet each way, which are on their way at the same time."""
    steps = 40
    with Network(2, delay=0.0) as network:
        network.delay(1, sending, receiving)
        run = start(network, pace=0.0, steps=steps)
        result = assert_same_as(run, yard.undisturbed(TASK, **SETTINGS, steps=steps))
    assert result["wall_seconds"] >= steps * (sending + receiving) / 2


@pytest.mark.long
@delayed
def test_a_delay_rises_and_falls(start: Start, yard: Yard) -> None:
    steps = 160
    with Network(2, delay=0.0) as network:
        run = start(network, steps=steps)
        run.await_step(20)
        network.delay(1, 0.04, 0.04)
        run.await_step(60)
        network.delay(1, 0.0, 0.01)
        assert_same_as(run, yard.undisturbed(TASK, **SETTINGS, steps=steps))


@pytest.mark.long
@delayed
def test_a_host_far_away_is_killed(start: Start, yard: Yard) -> None:
    steps = 40
    with Network(2, delay=0.02) as network:
        run = start(network, steps=steps)
        run.await_step(8)
        network.kill(1)
        assert run.await_loss()["host"] == "b"
        assert_same_as(run, yard.undisturbed(TASK, **SETTINGS, steps=steps))


@pytest.mark.long
@delayed
def test_a_host_beyond_the_timeout_is_dropped(start: Start, yard: Yard) -> None:
    steps = 160
    with Network(3, delay=0.0) as network:
        run = start(network, steps=steps, host_seconds=1.0)
        run.await_step(20)
        network.delay(2, 1.5, 1.5)
        assert run.await_loss()["host"] == "c"
        assert_same_as(run, yard.undisturbed(TASK, **SETTINGS, steps=steps))


@pytest.mark.long
def test_hosts_harmed_at_random() -> None:
    """`make chaos-hosts` goes on for as long as one likes."""
    done, problems = chaos(seed=1, faults=12, seconds=60.0)
    assert problems == []
    assert done.total() >= 12
