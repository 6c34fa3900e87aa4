"""Hosts whose certificates are renewed, expire, or are revoked, with real daemons on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lockstep.cluster.daemon.cluster_messages import (
    AskCertificate,
    CertificateIssued,
    CertificatesRevoked,
    HostRemoved,
    JobOffered,
    JobWithdrawn,
    RemoveHost,
    TakeJobs,
    report_of,
)
from lockstep.cluster.daemon.control_socket import ask
from lockstep.cluster.daemon.launcher import ClusterLauncher
from lockstep.errors import JobError, RefusedError
from lockstep.net.certificate_authority import renewal_request
from lockstep.net.identity import Identity
from lockstep.net.join_tokens import parse_token
from lockstep.net.revocation_list import REVOKED
from tests.cluster.test_registry_admission_ranks import an_offer
from tests.support import paced_task
from tests.support.command import lockstep
from tests.support.daemons import LIMIT, Daemon
from tests.support.harmed_runs import await_event, events
from tests.support.loopback_cluster import Loopback, cluster
from tests.support.paced_task import PACE
from tests.support.up_here import Up

__all__ = ["cluster"]  # fixture

PACED = "paced:Paced"
RUN = ("--batch-size", "24", "--shards", "6", "--seed", "5", "--threads", "1", "--json", "-q")


def fingerprint_alone(folder: Path, steps: int) -> str:
    done = lockstep("run", PACED, *RUN, "--steps", str(steps), "--workers", "1", cwd=folder)
    return str(json.loads(done.stdout)["fingerprint"])


def start(folder: Path, steps: int, pace: str) -> subprocess.Popen[str]:
    """A run on the cluster, which goes on."""
    return subprocess.Popen(
        [sys.executable, "-m", "lockstep", "run", PACED, *RUN, "--steps", str(steps),
         "--on", "up", "--state", "a", "--workers", "3", "--out", "run"],
        cwd=folder, env={**os.environ, PACE: pace}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def fingerprint_of(run: subprocess.Popen[str]) -> str:
    said, errors = run.communicate(timeout=LIMIT)
    assert run.returncode == 0, errors
    return str(json.loads(said)["fingerprint"])


def await_step(run: subprocess.Popen[str], folder: Path, step: int) -> None:
    def alive() -> None:
        assert run.poll() is None, run.communicate()

    await_event(
        folder / "run", lambda e: e["event"] == "evaluated" and e["step"] >= step,
        LIMIT, f"step {step}", alive,
    )  # fmt: skip


def remove(cluster: Loopback, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return lockstep("hosts", "--state", "a", "--remove", name, *arguments, cwd=cluster.folder)


def test_a_host_is_removed(cluster: Loopback) -> None:
    up = cluster.up()
    removed, other = cluster.member("gpu-one"), cluster.member("gpu-two")
    wrong = remove(cluster, "gpu-oen")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "one of gpu-one, gpu-two" in wrong.stderr
    assert "did you mean gpu-one?" in wrong.stderr
    done = remove(cluster, "gpu-one")
    assert done.returncode == 0, done.stderr
    assert "gpu-one is removed: its connections are ended" in done.stdout
    assert removed.wait()[0] == 1
    assert "host gpu-one was removed from the cluster" in removed.log
    assert list(cluster.hosts()) == ["gpu-two"]
    file = cluster.folder / "a" / "node" / REVOKED
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    # And so it stays.
    up.end(signal.SIGKILL)
    cluster.up()
    back = lockstep("join", "--state", "gpu-one", cwd=cluster.folder)
    assert back.returncode == 1
    assert "host gpu-one was removed from the cluster" in back.stderr
    other.until("waits for jobs")
    # The name is free, for who has a token.
    again = cluster.start("join", "-", "--state", "new", "--name", "gpu-one", said=cluster.token())
    again.until("waits for jobs")
    assert json.loads(remove(cluster, "gpu-one", "--json").stdout) == {
        "removed": "gpu-one", "connected": True, "jobs": [], "offers": [],
    }  # fmt: skip


def test_names_that_cannot_be_removed(tmp_path: Path) -> None:
    with contextlib.closing(Up(tmp_path)) as up:
        for name, why in (
            ("b", "there is no host b in this cluster\n  expected: a host that has joined; none"),
            ("a", "host a is the one that `lockstep up` runs on"),
            ("../../node/node.key", "there is no host"),
        ):
            with pytest.raises(JobError, match=re.escape(why)):
                ask(up.folder, RemoveHost(name=name), HostRemoved)
        up.identity("b")  # it has never been connected
        removed = ask(up.folder, RemoveHost(name="b"), HostRemoved)
        assert not removed.connected
        with pytest.raises(RefusedError, match="host b was removed from the cluster"), up.host("b"):
            pass


def test_a_master_that_is_removed(tmp_path: Path) -> None:
    """Its jobs are withdrawn; the host that coordinates them is told why."""
    reports: queue.SimpleQueue[str] = queue.SimpleQueue()
    with contextlib.closing(Up(tmp_path)) as up, up.host("b") as member:
        member.tell("a", TakeJobs(workers=1))
        up.until("takes jobs")
        token = parse_token(up.head.token())
        guest = ClusterLauncher.of_token(token, tmp_path / "g", lambda _, why: reports.put(why))
        offer = an_offer(master=guest.identity.node)
        with guest, ThreadPoolExecutor(1) as pool:
            offering = pool.submit(guest.offer, offer)
            assert isinstance(member.hear(LIMIT).message, JobOffered)
            member.tell("a", report_of(offer.job, "taken", ""))
            assert offering.result() == ("b",)
            removed = ask(up.folder, RemoveHost(name=guest.identity.node), HostRemoved)
            assert (removed.connected, removed.offers) == (True, [offer.job])
            assert member.hear(LIMIT).message == JobWithdrawn(job=offer.job)
            assert isinstance(member.hear(LIMIT).message, CertificatesRevoked)
            while "was removed from the cluster" not in reports.get(timeout=LIMIT):
                pass


@pytest.mark.long
def test_a_run_loses_a_host_that_is_removed(cluster: Loopback) -> None:
    """Also where its daemon does not hear of it: its agent would go on."""
    shutil.copy(paced_task.__file__, cluster.folder / "paced.py")
    cluster.up()
    members = [cluster.member(name, "--allow", "paced") for name in ("b", "c")]
    run = start(cluster.folder, 120, "0.01")
    await_step(run, cluster.folder, 20)
    members[0].process.send_signal(signal.SIGSTOP)
    done = remove(cluster, "b")
    assert "jobs that go on without it: " in done.stdout
    assert fingerprint_of(run) == fingerprint_alone(cluster.folder, 120)
    (lost,) = events(cluster.folder / "run", "host_lost")
    assert lost["host"] == "b"
    assert "removed from the cluster" in json.dumps(lost)


# Short lives.


@pytest.fixture
def brief(tmp_path: Path) -> Iterator[Up]:
    """An `up` whose certificates live for seconds."""
    made = Up(tmp_path, certificate_seconds=4.0)
    with contextlib.closing(made):
        yield made


def joined(up: Up, name: str, *arguments: str) -> Daemon:
    return Daemon(
        "join", "-", "--state", name, "--name", name, "-w", "1", *arguments,
        cwd=up.folder.parent, said=up.head.token(),
    )  # fmt: skip


def end_of(up: Up, name: str) -> float:
    """Until when a member's certificate is valid."""
    return Identity.load(up.folder.parent / name / "node").certificate().until


def test_certificates_are_renewed(brief: Up) -> None:
    first = brief.head.identity.certificate()
    with joined(brief, "b") as member:
        member.until("waits for jobs")
        for _ in range(3):
            member.until("its certificate is renewed, until")
        assert member.end() == 0
    now = brief.head.identity.certificate()
    assert now.until > first.until + 2.0
    assert end_of(brief, "b") > first.until + 2.0


def test_a_host_that_was_away_for_too_long(tmp_path: Path) -> None:
    """It is told what to type, and that is so."""
    with contextlib.closing(Up(tmp_path, certificate_seconds=3.0)) as up:
        with joined(up, "b") as member:
            member.until("waits for jobs")
            member.end()
        token = up.head.token()
        key = (tmp_path / "b/node/node.key").read_bytes()
        time.sleep(max(0.0, end_of(up, "b") + 0.1 - time.time()))
        late = lockstep("join", "--state", "b", cwd=tmp_path)
        assert late.returncode == 1
        assert "cannot be used any more" in late.stderr
        assert "token --token-file FILE; here, with the same --state: lockstep join" in late.stderr
        (tmp_path / "FILE").write_text(token)
        with Daemon("join", "FILE", "--state", "b", cwd=tmp_path) as back:
            back.until("b: waits for jobs")
        assert (tmp_path / "b/node/node.key").read_bytes() == key


def test_up_was_away_for_too_long(tmp_path: Path) -> None:
    """Its hosts try until it is there, and are then told what to type."""
    with contextlib.ExitStack() as stack:
        with contextlib.closing(Up(tmp_path, certificate_seconds=3.0)) as up:
            member = stack.enter_context(joined(up, "b"))
            member.until("waits for jobs")
        ended = end_of(up, "b")
        member.until("it is tried again until it is there")
        time.sleep(max(0.0, ended + 0.1 - time.time()))
        assert member.process.poll() is None
        stack.enter_context(contextlib.closing(Up(tmp_path)))
        assert member.wait()[0] == 1
        assert "cannot be used any more" in member.log
        assert "lockstep token --token-file FILE" in member.log


def test_a_host_that_asks_for_anothers_certificate(brief: Up) -> None:
    with brief.host("b") as host:
        host.tell("a", AskCertificate(request=renewal_request(brief.identity("c").folder)))
        brief.until("a certificate is renewed for the same name and key alone")
        asked = AskCertificate(request=renewal_request(brief.identity("b").folder))
        for _ in range(2):
            host.tell("a", asked)
        brief.until("host b wants certificates too often")
        said = [host.hear(LIMIT).message for _ in range(3)]
        assert [isinstance(each, CertificateIssued) for each in said] == [False, True, False]
    brief.check()


@pytest.mark.long
def test_a_run_that_outlives_its_certificates(tmp_path: Path) -> None:
    """A host comes, and the hosts connect anew, when those of the beginning have expired."""
    folder = tmp_path
    shutil.copy(paced_task.__file__, folder / "paced.py")
    with contextlib.ExitStack() as stack:
        brief = stack.enter_context(contextlib.closing(Up(folder, certificate_seconds=8.0)))
        for name in ("b", "c"):
            member = stack.enter_context(joined(brief, name, "--allow", "paced"))
            member.until("waits for jobs")
        ended = max(end_of(brief, name) for name in ("b", "c"))
        run = start(folder, 300, "0.02")
        await_step(run, folder, 20)
        while time.time() < ended + 1.0:
            assert run.poll() is None
            time.sleep(0.1)
        late = stack.enter_context(joined(brief, "d", "--allow", "paced"))
        late.until("waits for jobs")
        assert fingerprint_of(run) == fingerprint_alone(folder, 300)
    assert events(folder / "run", "host_lost") == []
    hosts = [each["hosts"] for each in events(folder / "run", "hosts")]
    assert hosts[-1] == ["a", "b", "c", "d"]
