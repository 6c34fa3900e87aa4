"""Members of a job that do what no member does: each is lost with a reason, and the run goes on."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lockstep.agent.host_messages import (
    FROM_MASTER,
    AgentFailed,
    EventForwarded,
    HostPaused,
    HostPresent,
    Recovered,
    StepRecorded,
)
from lockstep.agent.regroup_messages import HostStatus
from lockstep.errors import StoppedError, TaskError
from lockstep.net.connections import Item, Stream
from lockstep.net.frames import Kind, head
from lockstep.net.tcp_transport import TcpTransport
from lockstep.system.messages import ErrorMessage, Message
from tests.support.harmed_runs import assert_same, events, yard
from tests.support.message_values import body
from tests.support.multi_host_runs import PACED, TASK, WAIT, Live, Site, site, slow
from tests.support.paced_task import PACE

__all__ = ["site", "slow", "yard"]  # fixtures

LONG = pytest.mark.long
HARM = "LOCKSTEP_TEST_HARM"
"""Code that an agent runs before it serves."""
MUTE = """
from lockstep.collectives import exchange_thread as e
exchange = e.ExchangeThread._exchange
def mute(self, step):
    if step >= 30:
        while not self._stop.wait(0.05):
            pass
        raise e.CalledOff
    exchange(self, step)
e.ExchangeThread._exchange = mute
"""
NO_MEMORY = """
from lockstep.collectives import exchange_thread as e
exchange, left = e.ExchangeThread._exchange, [{times}]
def fail(self, step):
    if step >= 30 and left[0]:
        left[0] -= 1
        raise MemoryError
    exchange(self, step)
e.ExchangeThread._exchange = fail
"""
SHORT = """
from lockstep.agent.followed_part import FollowedPart
from lockstep.errors import ResourceError
_report = FollowedPart._report
def short(self):
    if self.group.step >= 30:
        raise ResourceError("there is no file descriptor left")
    _report(self)
FollowedPart._report = short
"""
RESTLESS = """
from lockstep.agent.host_regroup import HostRegroup
status = HostRegroup.status
HostRegroup.status = lambda self: None if self.group.step >= 30 else status(self)
""" + NO_MEMORY.format(times=1)
CLAIM = """
from lockstep.agent import host_regroup
from lockstep.agent.regroup_messages import HostStatus
def status(whole, snapshot, workers, address):
    return HostStatus(whole={whole}, snapshot=snapshot, address=address)
host_regroup.HostStatus = status
"""


@pytest.fixture(autouse=True)
def harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without harm in the end."""
    monkeypatch.setenv(HARM, "")


def start(site: Site, harm: str, **changes: Any) -> Live:
    """A run on the master's host, a good one, and a harmful one."""
    os.environ[HARM] = f"if os.environ['LOCKSTEP_TEST_HOST'] == 'c': exec({harm!r})"
    on = site.agents({"b": 1, "c": 1}, 1)
    return Live(site, on, **{"steps": 60, "exchange_seconds": 1.0, **changes})


def check(site: Site, live: Live, **changes: Any) -> None:
    """It ends with the bits of one host."""
    found = live.run.result(WAIT)
    os.environ[PACE] = "0"
    same = {"steps": 60, "exchange_seconds": 1.0, **changes}
    assert_same(found, site.yard.undisturbed(TASK, **PACED, **same))


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        pytest.param(MUTE, "exchanges nothing", id="mute", marks=LONG),
        pytest.param(NO_MEMORY.format(times=9), "MemoryError", id="no memory", marks=LONG),
        pytest.param(SHORT, "no file descriptor left", id="no descriptors", marks=LONG),
        pytest.param(RESTLESS, "has not come to rest", id="restless", marks=LONG),
        pytest.param(CLAIM.format(whole=10**6), "claims step 1000000", id="far ahead"),
        pytest.param(CLAIM.format(whole=10**30), "", id="no step", marks=LONG),
        pytest.param(CLAIM.format(whole="'5'"), "", id="text", marks=LONG),
    ],
)
def test_a_member_that_harms_is_lost(site: Site, slow: None, harm: str, why: str) -> None:
    live = start(site, harm)
    assert why in live.await_loss("c")["why"]
    check(site, live)
    assert {event["host"] for event in events(live.folder, "host_lost")} == {"c"}


def test_a_run_with_a_mute_member_stops(site: Site, slow: None) -> None:
    """Within seconds, though it would be waited for for minutes."""
    live = start(site, MUTE, steps=500, exchange_seconds=None)
    live.await_step(28)
    time.sleep(1.0)
    begun = time.monotonic()
    live.run.stop()
    with pytest.raises(StoppedError):
        live.run.result(WAIT)
    assert time.monotonic() - begun < 30.0
    assert [event["host"] for event in events(live.folder, "host_lost")] == ["c"]
    assert list(Path(live.folder, "checkpoints").iterdir())


@pytest.mark.long
def test_a_thread_that_fails_once_begins_anew(site: Site, slow: None) -> None:
    live = start(site, NO_MEMORY.format(times=1))
    check(site, live)
    assert not events(live.folder, "host_lost")
    assert any("MemoryError" in event["reason"] for event in events(live.folder, "hosts"))


def test_the_forkserver_of_a_member_is_killed(site: Site, slow: None) -> None:
    live = start(site, "", steps=200)
    live.await_step(20)
    os.kill(forkserver_of(site.opened[-1].processes["c"].pid), signal.SIGKILL)
    assert "forkserver" in live.await_loss("c")["why"]
    check(site, live, steps=200)


def forkserver_of(agent: int) -> int:
    """The process id of an agent's forkserver."""
    found = subprocess.run(
        ["pgrep", "-P", str(agent), "-f", "forkserver"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return int(found.stdout.split()[0])


# A host of the cluster that has no part in the run.

NOBODY: list[Message | bytes] = [
    body({"op": "HostPresent", "workers": 1, "facts": [1], "train_samples": 1, "eval_samples": 1}),
    HostPresent(workers=1, facts={"probe": "other"}, train_samples=1, eval_samples=1),
    StepRecorded(step=20, digest="0" * 64),
    *(StepRecorded(step=step, digest="0") for step in range(10**6, 10**6 + 150)),
    EventForwarded(name="failed", fields={"step": 3}),
    body({"op": "EventForwarded", "name": "died", "fields": {"time": "1970"}}),
    Recovered(recoveries=[{"step": 1}]),
    HostPaused(generation=2, status=HostStatus(whole=9, snapshot=None)),
    AgentFailed(error=ErrorMessage.of(TaskError("over")), step=1),
    *[AgentFailed(error=ErrorMessage.of(TaskError("again and again")), step=1)] * 200,
]


@pytest.mark.long
def test_who_is_no_part_of_a_run_cannot_speak_in_it(site: Site, slow: None) -> None:
    on = site.agents({"b": 1}, 1)
    live = Live(site, on, steps=200)
    live.await_step(4)
    for said in NOBODY:
        if isinstance(said, bytes):
            with speaker(site, on) as other:
                tell_raw(other, said)
                time.sleep(0.2)
    with speaker(site, on) as other:
        for said in NOBODY:
            if not isinstance(said, bytes):
                with contextlib.suppress(Exception):
                    other.tell("master", said)
        time.sleep(0.5)
    found = live.run.result(WAIT)
    os.environ[PACE] = "0"
    assert_same(found, site.yard.undisturbed(TASK, **PACED, steps=200))
    assert not found.recoveries
    of_it = [
        event for event in events(live.folder) if "x" in (event.get("host"), event.get("peer"))
    ]
    assert {event["event"] for event in of_it} <= {"refused", "connection"}
    assert len(of_it) < 40


@contextlib.contextmanager
def speaker(site: Site, on: Any) -> Iterator[TcpTransport]:
    """A host of the cluster that is connected to a run's master."""
    offer = on.offered
    transport = TcpTransport(on.cluster.identity("x"), job=offer.job, facts={}, codec=FROM_MASTER)
    with contextlib.closing(transport):
        transport.connect({offer.master: offer.address}, 10.0)
        yield transport


def tell_raw(transport: TcpTransport, content: bytes) -> None:
    """Send bytes in the place of a message."""
    sender = transport._peer("master", "").sender(Stream.CONTROL, "")
    sender.send(Item(head=head(Kind.CONTROL, length=len(content)) + content))
