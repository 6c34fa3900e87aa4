"""Jobs on the nodes of a real Ray cluster, with token authentication, on this machine."""

from __future__ import annotations

import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.cluster.launcher import Cluster
from lockstep.cluster.on_ray import address_in, check_address, on_ray
from lockstep.cluster.ray_agent import RayAgent
from lockstep.cluster.seats import MOST_AGENTS, Forget, Node, Reserve, Seats, Start, end, look
from lockstep.errors import (
    JobError,
    LockstepError,
    NetworkError,
    PeerClosedError,
    RefusedError,
    WorkerLostError,
    from_message,
)
from lockstep.net.authority import Authority, name_in
from lockstep.offer import Offer
from tests.command import python
from tests.conftest import describe, processes
from tests.daemons import Daemon
from tests.faulty import Event, Yard, assert_same, await_event, events, until, yard
from tests.ray_nodes import LIMIT, ROOT, RayNodes

__all__ = ["yard"]  # a fixture

TASK = "tests.gated:Gated"
SETTINGS: dict[str, Any] = {
    "batch_size": 24,
    "steps": 200,
    "shards": 6,
    "threads": 1,
    "seed": 5,
    "evaluate": False,
}


# Pure decisions.


def node(name: str) -> Node:
    return Node(id=name, name=f"host-{name}", address="10.0.0.1", workers=2)


A, B = node("a"), node("b")


def test_every_node_gets_an_agent_and_loses_it_when_it_is_gone() -> None:
    seats, commands = look({}, [A, B])
    assert commands == (Reserve((A, B)), Start(A), Start(B))
    seats, commands = look(seats, [A, B])
    assert commands == ()
    seats, commands = look(seats, [B, node("c")])
    assert commands == (Forget("a"), Reserve((node("c"),)), Start(node("c")))
    seats, commands = look(seats, [])
    assert commands == (Forget("b"), Forget("c"))
    assert not seats


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (WorkerLostError("its actor died"), True),
        (PeerClosedError("the master is lost"), True),
        (RefusedError("it differs"), False),
        (JobError("no such task"), False),
        (None, False),
    ],
)
def test_who_is_followed_by_another_agent(error: LockstepError | None, again: bool) -> None:
    seats, _ = look({}, [A, B])
    seats, follows = end(seats, "a", error)
    assert follows.startswith("another one") == again
    assert look(seats, [A, B])[1] == ((Start(A),) if again else ())
    assert look(seats, [B])[1] == (Forget("a"),)


def test_agents_are_started_a_bounded_number_of_times() -> None:
    seats: Seats = {}
    started = 0
    while Start(A) in (found := look(seats, [A]))[1]:
        started += 1
        seats, why = end(found[0], "a", WorkerLostError("its actor died"))
    assert started == MOST_AGENTS
    assert "not started again" in why


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert address_in("ray") == "auto"
    assert address_in("ray:10.0.0.1:6379") == "10.0.0.1:6379"
    assert address_in("up") is address_in("rays") is address_in("./ray") is None
    client = address_in("ray://10.0.0.1:10001")
    assert client is not None
    with pytest.raises(JobError, match="not an address"):
        check_address(client)
    with pytest.raises(JobError, match="not an address"):
        check_address("")
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.1:10001")
    with pytest.raises(JobError, match="not an address"):
        check_address("auto")
    check_address("10.0.0.1:6379")


def test_ray_is_missing(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['ray'] = None; sys.argv[1:] = ['run', 'mnist', '--on', 'ray']\n"
        "from lockstep.cli import main; main()"
    )
    done = python("-", cwd=tmp_path, script=script)
    assert done.returncode == 1
    assert "pip install 'lockstep-dlp[ray]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_there_is_no_such_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where `auto` looks
    with pytest.raises(NetworkError, match="cannot be reached") as caught, on_ray():
        pass
    assert "ray start" in caught.value.fix


def test_no_secret_goes_through_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what an actor makes, the key stays where it is, and goes with it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    ca = Authority.open(tmp_path / "ca" / "authority")
    actor = RayAgent()
    request = actor.request("host-a")
    (key,) = tmp_path.glob("lockstep-ray-*/node/node.key")
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert request.startswith(b"-----BEGIN CERTIFICATE REQUEST-----")
    assert request.count(b"-----BEGIN") == 1
    assert name_in(ca.sign(request)) == "host-a"
    other = RayAgent()  # a certificate for its key is of no use to the first
    certificate = ca.sign(other.request("host-b"))
    offer = Offer(job="job", master="master", address=("127.0.0.1", 9), task="mnist")
    said = actor.serve(certificate, ca.certificate, offer.to_message(), 1, "127.0.0.1")
    assert from_message(said).found == "it is for another key"
    other.end()
    assert not list(tmp_path.glob("lockstep-ray-*"))


# A cluster of three nodes, the first of which is the master's.


@pytest.fixture(scope="module")
def shared() -> Iterator[RayNodes]:
    made = RayNodes(3, {})
    yield made
    made.close()


@pytest.fixture
def nodes(shared: RayNodes, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayNodes]:
    """The cluster, with what its clients need in the environment."""
    for name, value in shared.environment.items():
        monkeypatch.setenv(name, value)
    shared.gate.touch()
    yield shared
    shared.gate.unlink(missing_ok=True)
    shared.await_end(None)


def hosts_in(event: Event) -> set[str]:
    return set(event["hosts"]) if event["event"] == "hosts" and event["going_on"] else set()


def test_three_nodes_give_the_bits_of_one(nodes: RayNodes, yard: Yard) -> None:
    nodes.gate.unlink()
    with on_ray(nodes.address) as on:
        found = lockstep.run(TASK, on=on, workers=3, out=yard.path(), quiet=True, **SETTINGS)
    assert_same(found, yard.undisturbed(TASK, **SETTINGS))
    hosts = hosts_in(events(found.folder, "hosts")[-1])
    assert len(hosts) == 3
    assert "master" in hosts
    nodes.await_end([])


class Watched:
    """A run in the background, on a cluster, while its gate is closed."""

    def __init__(self, on: Cluster, out: str, workers: int) -> None:
        self.out = out
        self.run = lockstep.start(TASK, on=on, workers=workers, out=out, quiet=True, **SETTINGS)

    def event(self, wanted: Callable[[Event], bool], what: str) -> Event:
        """The first event of a kind; the run has to go on until then."""

        def alive() -> None:
            if not self.run.running:
                self.run.result()

        return await_event(self.out, wanted, LIMIT, what, alive)

    def hosts(self, wanted: int, without: set[str]) -> set[str]:
        """The hosts, once there are so many, and none of some."""

        def fits(event: Event) -> bool:
            found = hosts_in(event)
            return len(found) == wanted and not found & without

        return hosts_in(self.event(fits, f"{wanted} hosts"))


def test_an_actor_is_killed_and_a_node_is_added(nodes: RayNodes, yard: Yard) -> None:
    """The host is named, another agent takes its place, and the new node takes part."""
    with on_ray(nodes.address) as on:
        run = Watched(on, yard.path(), workers=4)
        before = run.hosts(3, set())
        os.kill(nodes.found("ray::RayAgent")[0], signal.SIGKILL)
        lost = run.event(lambda event: event["event"] == "host_lost", "a loss")["host"]
        assert lost in before - {"master"}
        run.hosts(3, {lost})
        nodes.add()
        run.hosts(4, {lost})
        nodes.gate.unlink()
        found = run.run.result()
    assert_same(found, yard.undisturbed(TASK, **SETTINGS))
    why = [event["why"] for event in events(run.out, "connection") if event["peer"] == lost]
    assert any("another one is started" in each for each in why), why


@pytest.mark.long
def test_the_driver_is_killed(nodes: RayNodes, yard: Yard, session_mark: bytes) -> None:
    """The actors end with it; the master goes on, and another driver starts others."""
    with on_ray(nodes.address) as on:
        run = Watched(on, yard.path(), workers=6)
        before = run.event(lambda event: len(hosts_in(event)) >= 3, "all hosts")
        (driver,) = (pid for pid in processes(session_mark) if "ray_driver" in describe(pid))
        os.kill(driver, signal.SIGKILL)
        without = hosts_in(before) - {"master"}
        run.hosts(len(hosts_in(before)), without)
        nodes.gate.unlink()
        found = run.run.result()
    assert_same(found, yard.undisturbed(TASK, **SETTINGS))


def test_the_master_is_killed(nodes: RayNodes, tmp_path: Path) -> None:
    """Nobody outlives it, and no key of the run stays on a disk."""
    (tmp_path / "tmp").mkdir()
    (tmp_path / "job.yaml").write_text(json.dumps({"task": TASK, **SETTINGS}))
    old = nodes.files()
    with Daemon(
        *("run", "job.yaml", "--on", "ray", "--workers", "6", "--out", "run", "-q"),
        cwd=tmp_path,
        environment={
            "RAY_ADDRESS": nodes.address,
            "TMPDIR": str(tmp_path / "tmp"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
    ) as master:
        is_whole = lambda event: len(hosts_in(event)) >= 3  # noqa: E731

        def alive() -> None:
            if master.process.poll() is not None:
                raise AssertionError(master.wait()[1] + master.log)

        await_event(tmp_path / "run", is_whole, LIMIT, "all hosts", alive)
        assert nodes.ours()
        assert nodes.files() != old
        master.end(signal.SIGKILL)
    nodes.await_end(old)
    until(lambda: not list((tmp_path / "tmp").iterdir()), LIMIT, "that the CA's folder is gone")


def test_a_wrong_token_is_refused(nodes: RayNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(NetworkError, match="cannot be reached"), on_ray(nodes.address):
        pass
