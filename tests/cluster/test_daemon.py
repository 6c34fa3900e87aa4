"""From machines to agents: `up`, `join`, `run --on` and ranks, with real processes on loopback."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import shutil
import signal
import socket
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lockstep.agent.job_offer import JobOffer
from lockstep.cluster.ranks.cluster_spec import on_ranks, rank_in
from lockstep.cluster.ranks.launcher import MASTER, RankLauncher, enter, own_address, shared_secret
from lockstep.cluster.ranks.rank_environment import RankInfo, rank_info
from lockstep.errors import (
    IdentityError,
    JobError,
    NetworkError,
    RefusedError,
)
from lockstep.job.job import Job
from lockstep.net.shared_secret import SharedSecret, make_secret
from tests.cluster.test_registry_admission_ranks import TORCHRUN, an_offer
from tests.support.command import TASKS, lockstep
from tests.support.daemons import LIMIT, Daemon
from tests.support.loopback_cluster import Loopback, cluster

__all__ = ["cluster"]  # fixture

# Daemons.


RUN = (
    "run",
    "blobs:Blobs",
    "--batch-size",
    "16",
    "--steps",
    "5",
    "--shards",
    "3",
    "--threads",
    "1",
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the job on this machine alone."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(TASKS, folder / "blobs.py")
    done = lockstep(*RUN, "--workers", "1", "--json", "-q", cwd=folder)
    return str(json.loads(done.stdout)["fingerprint"])


def modes(folder: Path) -> Iterator[tuple[Path, int]]:
    for path in (folder, *folder.rglob("*")):
        yield path, stat.S_IMODE(path.stat().st_mode)


def test_two_hosts_take_part_in_a_job(cluster: Loopback, alone: str) -> None:
    up = cluster.up()
    hosts = [cluster.member(name, "--allow", "blobs") for name in ("b", "c")]
    on = ("--on", "up", "--state", "a", "--workers", "3", "--out", "run", "--json", "-q")
    done = lockstep(*RUN, *on, cwd=cluster.folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fingerprint"] == alone
    events = [json.loads(line) for line in (cluster.folder / "run/events.jsonl").open()]
    assert [each["hosts"] for each in events if each["event"] == "hosts"][-1] == ["a", "b", "c"]
    for host in hosts:
        host.until("its agent has ended")
        assert host.end(signal.SIGINT) == 0
    assert up.end(signal.SIGHUP) == 0


def test_files_are_private(cluster: Loopback) -> None:
    up = cluster.start("up", "--state", "a", "--name", "a", "--token-file", "t", "--tokens", "2")
    up.until("`lockstep up` at")
    member = cluster.start("join", "t-1", "--state", "b", "--name", "b")
    member.until("waits for jobs")
    made = [*modes(cluster.folder / "a"), *modes(cluster.folder / "b")]
    for path, mode in made:
        assert mode == (0o700 if path.is_dir() else 0o600), path
    names = {path.name for path, _ in made}
    assert names >= {"up.sock", "up.json", "cluster.json", "node.key", "authority.key", "lock"}
    assert (cluster.folder / "t-2").stat().st_mode & 0o777 == 0o600
    asked = lockstep("token", "--state", "a", "--token-file", "t-3", cwd=cluster.folder)
    assert (asked.returncode, asked.stdout) == (0, "")
    assert (cluster.folder / "t-3").stat().st_mode & 0o777 == 0o600
    assert (cluster.folder / "t-3").read_text().startswith("lockstep1-")
    again = lockstep("up", "--state", "a", cwd=cluster.folder)
    assert again.returncode == 1
    assert "is in use" in again.stderr
    assert up.end() == 0
    assert not (cluster.folder / "a" / "up.sock").exists()
    assert up.wait()[1] == ""  # the tokens are in files


def test_what_to_do_while_no_host_has_joined(cluster: Loopback, alone: str) -> None:
    up = cluster.start("up", "--state", "a", "--name", "a")
    up.until("lockstep join - --state FOLDER, and paste a token")
    shown = lockstep("hosts", "--state", "a", cwd=cluster.folder)
    assert shown.returncode == 0
    assert shown.stdout.startswith("no host has joined; to invite one: lockstep token")
    assert lockstep("hosts", "--state", "a", "--json", cwd=cluster.folder).stdout == "[]\n"
    on = ("--on", "up", "--state", "a", "--workers", "1", "--json", "-q")
    done = lockstep(*RUN, *on, cwd=cluster.folder)
    assert json.loads(done.stdout)["fingerprint"] == alone
    assert "no host has joined: the job begins on this machine alone" in done.stderr
    token = lockstep("token", "--state", "a", cwd=cluster.folder).stdout
    member = cluster.start("join", "-", "--state", "b", "--name", "b", said=token)
    member.until("waits for jobs")
    assert up.end() == 0
    first = up.wait()[1].strip()
    assert first.startswith("lockstep1-")
    assert first not in up.log  # a token is for stdout alone


def test_tokens(cluster: Loopback) -> None:
    cluster.up()
    token = cluster.token()
    given = lockstep("join", token, "--state", "b", cwd=cluster.folder)
    assert given.returncode == 1
    assert "on the command line, where other users can see it" in given.stderr
    assert token not in given.stderr
    assert not (cluster.folder / "b").exists()
    late = Daemon("join", "-", "--state", "b", cwd=cluster.folder, said=cluster.token(valid=0))
    assert late.wait()[0] == 1
    assert "it expired" in late.log
    (cluster.folder / "token").write_text(token)
    first = cluster.start("join", "token", "--state", "b", "--name", "b")
    first.until("waits for jobs")
    second = lockstep("join", "token", "--state", "c", "--name", "c", cwd=cluster.folder)
    assert second.returncode == 1
    assert "it was used before" in second.stderr
    first.end()
    again = lockstep("join", "token", "--state", "b", cwd=cluster.folder)
    assert "has joined a cluster already, as b" in again.stderr
    stranger = lockstep("join", "--state", "d", cwd=cluster.folder)
    assert "has joined no cluster yet" in stranger.stderr


def test_up_comes_back_and_so_do_hosts_and_offers(cluster: Loopback) -> None:
    up = cluster.up()
    members = [cluster.member(name) for name in ("b", "c")]
    reports: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    with cluster.launcher(reports) as launcher:
        assert launcher.offer(an_offer("blobs:Blobs")) == ()  # nobody allows it
        assert {reports.get(timeout=LIMIT)[0], reports.get(timeout=LIMIT)[0]} == {"b", "c"}
        up.end(signal.SIGKILL)
        for member in members:
            member.until("it is tried again until it is there")
        assert "goes on with the hosts that it has" in reports.get(timeout=LIMIT)[1]
        up = cluster.up()
        for member in members:
            member.until("waits for jobs")
        again = {reports.get(timeout=LIMIT) for _ in members}
        assert {name for name, _ in again} == {"b", "c"}
        assert all("host b does not" in why or "host c does not" in why for _, why in again)
        assert cluster.hosts() == {"b": {"job": "refused"}, "c": {"job": "refused"}}
    up.until("offers job 'job' no more")
    assert cluster.hosts() == {"b": {}, "c": {}}


def test_hosts_come_back_without_a_token_and_names_are_kept(cluster: Loopback) -> None:
    cluster.up()
    cluster.member("b").end()
    back = cluster.start("join", "--state", "b", "--name", "z")
    cluster.centre.until("b: takes jobs")
    back.until("b: waits for jobs")
    assert list(cluster.hosts()) == ["b"]
    shown = lockstep("hosts", "--state", "a", cwd=cluster.folder)
    assert shown.stdout.split()[0] == "b"


def waiting_agent(member: Daemon, listener: socket.socket) -> int:
    """The process id of a host's agent that has begun to connect to its master."""
    pid = int(member.until(": agent ").partition(": agent ")[2].partition(",")[0])
    sock, _ = listener.accept()
    sock.close()
    return pid


def test_agents_that_are_killed_and_hosts_that_are_killed(cluster: Loopback) -> None:
    """The former are reported and followed by others; the latter leave no process."""
    cluster.up()
    member = cluster.member("b", "--allow", "blobs")
    reports: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT)
        offer = JobOffer(job="one", master="a", address=listener.getsockname(), task="blobs:Blobs")
        with cluster.launcher(reports) as launcher:
            assert launcher.offer(offer) == ("b",)
            os.kill(waiting_agent(member, listener), signal.SIGKILL)
            who, reason = reports.get(timeout=LIMIT)
            assert who == "b"
            assert "signal 9" in reason
            assert "another one is started" in reason
            waiting_agent(member, listener)
        offer = JobOffer(job="two", master="a", address=listener.getsockname(), task="blobs:Blobs")
        with cluster.launcher(reports) as launcher:
            assert launcher.offer(offer) == ("b",)
            agent = os.pidfd_open(waiting_agent(member, listener))
            try:
                member.end(signal.SIGKILL)
                assert select.select([agent], [], [], LIMIT)[0], "the agent has outlived its host"
            finally:
                os.close(agent)
            assert reports.get(timeout=LIMIT) == ("b", "failed: the host is gone")


def test_no_up(tmp_path: Path) -> None:
    for command in (("hosts",), ("token",), (*RUN, "--on", "up")):
        done = lockstep(*command, "--state", "a", cwd=tmp_path)
        assert done.returncode == 1
        assert "start it on this machine: lockstep up" in done.stderr


# Ranks.


def test_ranks_enter_with_the_shared_secret(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = RankInfo(rank=0, size=3, host="127.0.0.1", port=port, job="j")
    others = [RankInfo(rank=rank, size=3, host="127.0.0.1", port=port, job="j") for rank in (1, 2)]
    shared = SharedSecret(secret=bytes(32), job="j")
    wrong = SharedSecret(secret=bytes(31) + b"1", job="j")
    with (
        ThreadPoolExecutor(2) as pool,
        RankLauncher(place, shared, tmp_path / "0", workers=None, wait=LIMIT) as ranks,
    ):
        # They may come before it listens.
        coming = [
            pool.submit(enter, each, shared, tmp_path / str(each.rank), LIMIT) for each in others
        ]
        assert ranks.identity.node == MASTER
        assert ranks.offer(an_offer(master=MASTER)) == ("rank-1", "rank-2")
        for each in coming:
            _, offer = each.result()
            assert offer == an_offer(master=MASTER)
        with pytest.raises(RefusedError, match="does not prove that it has the shared secret"):
            enter(others[0], wrong, tmp_path / "3", LIMIT)
        with pytest.raises(RefusedError, match="was refused"):
            enter(others[0], shared, tmp_path / "4", LIMIT)


def test_a_secret_is_wanted_between_machines(tmp_path: Path) -> None:
    place = rank_info(TORCHRUN)
    with pytest.raises(IdentityError, match="cannot know each other") as caught:
        shared_secret(place, None)
    assert "lockstep secret" in caught.value.fix
    make_secret(tmp_path / "s")
    assert shared_secret(place, tmp_path / "s").job == place.job
    with pytest.raises(NetworkError):
        enter(
            RankInfo(rank=1, size=2, host="127.0.0.1", port=1, job="j"),
            shared_secret(place, tmp_path / "s"),
            tmp_path / "n",
            0.0,
        )


def test_a_name_of_rank_0_that_leads_nowhere() -> None:
    """As SLURM's names of nodes may."""
    with pytest.raises(IdentityError, match="no interface leads to node1") as caught:
        own_address(RankInfo(rank=1, size=2, host="node1.invalid", port=1, job="j"))
    assert "SLURM: MASTER_ADDR=ADDRESS" in caught.value.fix


def test_two_ranks_run_a_job(tmp_path: Path, alone: str) -> None:
    shutil.copy(TASKS, tmp_path / "blobs.py")
    job = {"task": "blobs.py:Blobs", "batch_size": 16, "steps": 5, "shards": 3, "threads": 1}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1] - 1)
    with contextlib.ExitStack() as stack:
        ranks = []
        for rank in ("0", "1"):
            place = {**TORCHRUN, "RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            daemon = Daemon(
                *("rank", "-w", "1", "job.yaml"),
                cwd=tmp_path,
                environment={**place, "XDG_STATE_HOME": str(tmp_path)},
            )
            ranks.append(stack.enter_context(daemon))
        (code, out), (other, _) = ranks[0].wait(), ranks[1].wait()
    assert (code, other) == (0, 0), ranks[0].log + ranks[1].log
    assert "closed the connection" not in ranks[0].log + ranks[1].log, "they have said goodbye"
    assert json.loads(out)["fingerprint"] == alone


@pytest.mark.long
def test_a_cluster_of_workers_and_parameter_servers(tmp_path: Path, alone: str) -> None:
    """Described in the job file; each process is told which entry it is."""
    shutil.copy(TASKS, tmp_path / "blobs.py")
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(4)]
        worker, ps, other, spare = (f"127.0.0.1:{each.getsockname()[1]}" for each in free)
    cluster = {"ps": [ps, spare], "worker": [worker, other]}
    job = {"task": "blobs.py:Blobs", "batch_size": 16, "steps": 5, "shards": 3, "threads": 1,
           "cluster": cluster}  # fmt: skip
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    with contextlib.ExitStack() as stack:
        daemons = [
            stack.enter_context(
                Daemon(
                    *("rank", "-w", "1", "--task", task, "job.yaml"),
                    cwd=tmp_path,
                    environment={"XDG_STATE_HOME": str(tmp_path)},
                )
            )
            for task in ("worker:0", "ps:1", "worker:1", "ps:0")
        ]
        ended = [daemon.wait() for daemon in daemons]
    assert [code for code, _ in ended] == [0] * 4, "".join(daemon.log for daemon in daemons)
    assert json.loads(ended[0][1])["fingerprint"] == alone
    manifest = json.loads((tmp_path / "runs" / "blobs-1" / "manifest.json").read_text())
    assert manifest["plan"]["servers"] == ["rank-2", "rank-3"]
    assert manifest["plan"]["workers"] == 2


@pytest.mark.parametrize(
    ("cluster", "task", "match"),
    [
        ({"worker": ["a:1"]}, "ps:0", "no such process"),
        ({"worker": ["a:1", "b:2"], "ps": ["b:2"]}, "ps:0", "the same"),
        ({"worker": ["a"]}, "worker:0", "an entry of the cluster is none"),
        ({"worker": [], "ps": ["a:1"]}, "ps:0", "not described"),
        ({"worker": ["a:1"], "chief": ["b:1"]}, "worker:0", "not described"),
    ],
)
def test_clusters_that_make_no_sense(cluster: dict[str, list[str]], task: str, match: str) -> None:
    with pytest.raises(JobError, match=match):
        rank_in(cluster, task)


def test_ranks_of_a_cluster() -> None:
    cluster = {"ps": ["c:3"], "worker": ["a:1", "b:2"]}
    places = [rank_in(cluster, task) for task in ("worker:0", "worker:1", "ps:0")]
    assert [place.rank for place in places] == [0, 1, 2]
    assert {(place.host, place.port, place.size, place.job) for place in places} == {
        ("a", 1, 3, places[0].job)
    }
    assert [place.own for place in places] == ["a", "b", "c"]
    job = on_ranks(Job(task="mnist", cluster=cluster))
    assert (job.ownership, list(job.servers), job.cluster) == ("servers", ["rank-2"], None)
    assert on_ranks(Job(task="mnist", cluster={"worker": ["a:1"]})).ownership == "replicated"
