"""Runs on a Ray cluster of this machine that can be watched, and let go on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ray._private.services import get_node_ip_address

import lockstep
from lockstep.cluster.daemon.launcher import ClusterLauncher
from tests.support.harmed_runs import Event, await_event
from tests.support.ray_cluster import LIMIT, RayNodes
from tests.support.ray_tls import credentials

TASK = "tests.support.gated_task:Gated"
SETTINGS: dict[str, Any] = {
    "batch_size": 24,
    "steps": 200,
    "shards": 6,
    "threads": 1,
    "seed": 5,
    "evaluate": False,
}
PATIENCE = {"RAY_gcs_rpc_server_reconnect_timeout_s": "6"}
"""For how long nodes and clients wait for a head that is gone: seconds, where Ray has a minute."""


@contextlib.contextmanager
def in_use(nodes: RayNodes, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayNodes]:
    """A cluster for one test, with what its clients need in the environment; the gate is closed."""
    for name, value in nodes.environment.items():
        monkeypatch.setenv(name, value)
    nodes.gate.touch()
    yield nodes
    nodes.gate.unlink(missing_ok=True)
    nodes.await_end(None)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    """A cluster of three nodes, the first of which is the master's, with TLS."""
    keys = credentials(tmp_path_factory.mktemp("tls") / "keys", get_node_ip_address())
    with contextlib.closing(RayNodes(3, PATIENCE | keys)) as made:
        yield made


@pytest.fixture
def nodes(shared: RayNodes, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayNodes]:
    with in_use(shared, monkeypatch):
        yield shared


def hosts_in(event: Event) -> set[str]:
    return set(event["hosts"]) if event["event"] == "hosts" and event["going_on"] else set()


class Watched:
    """A run in the background, on a cluster, while its gate is closed."""

    def __init__(self, on: ClusterLauncher, out: str, workers: int) -> None:
        self.out = out
        self.run = lockstep.start(TASK, on=on, workers=workers, out=out, quiet=True, **SETTINGS)

    def event(self, wanted: Callable[[Event], bool], what: str) -> Event:
        """The first event of a kind; the run has to go on until then."""

        def alive() -> None:
            if not self.run.running:
                self.run.result()

        return await_event(self.out, wanted, LIMIT, what, alive)

    def lost(self, before: set[str]) -> str:
        """The host that is lost, when these are already."""

        def fits(event: Event) -> bool:
            return event["event"] == "host_lost" and event["host"] not in before

        return str(self.event(fits, "a loss")["host"])

    def hosts(self, wanted: int, without: set[str]) -> set[str]:
        """The hosts, once there are so many, and none of some."""

        def fits(event: Event) -> bool:
            found = hosts_in(event)
            return len(found) == wanted and not found & without

        return hosts_in(self.event(fits, f"{wanted} hosts"))
