"""Jobs on the nodes of a Ray cluster on this machine, with its TLS and token authentication."""

from __future__ import annotations

import json
import os
import signal
import stat
from pathlib import Path

import pytest

import lockstep
from lockstep.agent.job_offer import JobOffer
from lockstep.cluster.daemon.agent_processes import ERROR
from lockstep.cluster.ray.actor import RayAgent
from lockstep.cluster.ray.launcher import address_in, check_address, on_ray
from lockstep.cluster.ray.node_agents import (
    MOST_AGENTS,
    Forget,
    Node,
    NodeAgents,
    Reserve,
    Start,
    end,
    look,
)
from lockstep.errors import (
    JobError,
    LockstepError,
    NetworkError,
    PeerClosedError,
    RefusedError,
    WorkerLostError,
)
from lockstep.net.certificate_authority import Authority
from lockstep.net.certificates import name_in
from lockstep.system.messages import encode
from tests.support.command import python
from tests.support.daemons import Daemon
from tests.support.harmed_runs import Yard, assert_same, await_event, events, until, yard
from tests.support.ray_cluster import LIMIT, ROOT, RayNodes
from tests.support.ray_runs import SETTINGS, TASK, Watched, hosts_in, nodes, shared
from tests.support.ray_tls import answer

__all__ = ["nodes", "shared", "yard"]  # fixtures


# Pure decisions.


def node(name: str) -> Node:
    return Node(id=name, name=f"host-{name}", address="10.0.0.1", workers=2)


A, B = node("a"), node("b")


def test_every_node_gets_an_agent_and_loses_it_when_it_is_gone() -> None:
    node_agents, commands = look({}, [A, B])
    assert commands == (Reserve((A, B)), Start(A), Start(B))
    node_agents, commands = look(node_agents, [A, B])
    assert commands == ()
    node_agents, commands = look(node_agents, [B, node("c")])
    assert commands == (Forget("a"), Reserve((node("c"),)), Start(node("c")))
    node_agents, commands = look(node_agents, [])
    assert commands == (Forget("b"), Forget("c"))
    assert not node_agents


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
    node_agents, _ = look({}, [A, B])
    node_agents, follows = end(node_agents, "a", error)
    assert follows.startswith("another one") == again
    assert look(node_agents, [A, B])[1] == ((Start(A),) if again else ())
    assert look(node_agents, [B])[1] == (Forget("a"),)


def test_agents_are_started_a_bounded_number_of_times() -> None:
    node_agents: NodeAgents = {}
    started = 0
    while Start(A) in (found := look(node_agents, [A]))[1]:
        started += 1
        node_agents, why = end(found[0], "a", WorkerLostError("its actor died"))
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
        "from lockstep.cli.main import main; main()"
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
    offer = JobOffer(job="job", master="master", address=("127.0.0.1", 9), task="mnist")
    said = actor.serve(certificate, ca.certificate, encode(offer), 1, "127.0.0.1")
    assert ERROR.decode(said).error().found == "it is for another key"
    other.end()
    assert not list(tmp_path.glob("lockstep-ray-*"))


# A cluster of three nodes, the first of which is the master's.


def test_ray_hangs_up_on_clients_without_a_certificate(nodes: RayNodes) -> None:
    key = Path(nodes.environment["RAY_TLS_SERVER_KEY"])
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert answer(nodes.address, nodes.environment, certificate=True)
    assert not answer(nodes.address, nodes.environment, certificate=False)


def test_three_nodes_give_the_bits_of_one(nodes: RayNodes, yard: Yard) -> None:
    nodes.gate.unlink()
    with on_ray(nodes.address) as on:
        found = lockstep.run(TASK, on=on, workers=3, out=yard.path(), quiet=True, **SETTINGS)
    assert_same(found, yard.undisturbed(TASK, **SETTINGS))
    hosts = hosts_in(events(found.folder, "hosts")[-1])
    assert len(hosts) == 3
    assert "master" in hosts
    nodes.await_end([])


@pytest.mark.long
def test_a_node_dies_and_an_actor_and_a_node_comes(nodes: RayNodes, yard: Yard) -> None:
    """Those that are lost are named; another agent takes the actor's place, though the node that
    has died was of the same placement group; the new node takes part."""
    with on_ray(nodes.address) as on:
        run = Watched(on, yard.path(), workers=3)
        before = run.hosts(3, set())
        nodes.kill_node(nodes.found("ray::RayAgent")[0])
        first = run.lost(set())
        (actor,) = nodes.found("ray::RayAgent")
        run.hosts(2, {first})
        os.kill(actor, signal.SIGKILL)
        second = run.lost({first})
        assert {"master", first, second} == before
        run.hosts(2, {first, second})
        nodes.add()
        run.hosts(3, {first, second})
        nodes.gate.unlink()
        found = run.run.result()
    assert_same(found, yard.undisturbed(TASK, **SETTINGS))
    why = [event["why"] for event in events(run.out, "connection") if event["peer"] == second]
    assert any("another one is started" in each for each in why), why


@pytest.mark.long
def test_the_master_is_killed_and_the_run_resumed(
    nodes: RayNodes, tmp_path: Path, yard: Yard
) -> None:
    """Nobody outlives it, and no key of the run stays on a disk."""
    (tmp_path / "tmp").mkdir()
    settings = {"task": TASK, **SETTINGS, "checkpoint_steps": 3}
    (tmp_path / "job.yaml").write_text(json.dumps(settings))
    old = nodes.files()
    environment = {
        "RAY_ADDRESS": nodes.address,
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    with Daemon(
        *("run", "job.yaml", "--on", "ray", "--workers", "6", "--out", "run", "-q"),
        cwd=tmp_path,
        environment=environment,
    ) as master:
        is_whole = lambda event: len(hosts_in(event)) >= 3  # noqa: E731

        def alive() -> None:
            if master.process.poll() is not None:
                raise AssertionError(master.wait()[1] + master.log)

        await_event(tmp_path / "run", is_whole, LIMIT, "all hosts", alive)
        is_safe = lambda event: event["event"] == "checkpoint" and event["step"]  # noqa: E731
        await_event(tmp_path / "run", is_safe, LIMIT, "a checkpoint", alive)
        assert nodes.ours()
        assert nodes.files() != old
        master.end(signal.SIGKILL)
    nodes.await_end(old)
    until(lambda: not list((tmp_path / "tmp").iterdir()), LIMIT, "that the CA's folder is gone")
    nodes.gate.unlink()
    with on_ray(nodes.address) as on:
        found = lockstep.resume(tmp_path / "run", workers=3, on=on, quiet=True)
    assert_same(found, yard.undisturbed(TASK, **SETTINGS))


@pytest.mark.long
def test_a_wrong_token_is_refused(nodes: RayNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(NetworkError, match="cannot be reached"), on_ray(nodes.address):
        pass
