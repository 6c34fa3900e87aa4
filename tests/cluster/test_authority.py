"""What a host of the cluster may have another one do, with real daemons: not read its files, nor
call what was not allowed."""

from __future__ import annotations

import queue
import shutil

from lockstep.agent.job_offer import JobOffer, without_contents
from lockstep.errors import DataError, PeerClosedError
from tests.support.command import lockstep
from tests.support.loopback_cluster import Loopback, cluster

__all__ = ["cluster"]  # a fixture

LIMIT = 30.0


def offer_of(task: str, **args: object) -> JobOffer:
    return JobOffer(job="job", master="a", address=("127.0.0.1", 9), task=task, args=args)


def refused(cluster: Loopback, offer: JobOffer) -> str:
    """Why the one host of a cluster refuses an offer."""
    reports: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()
    with cluster.launcher(reports) as launcher:
        assert launcher.offer(offer) == ()
        return reports.get(timeout=LIMIT)[1]


def test_files_of_another_host_are_not_read(cluster: Loopback) -> None:
    """Nor does an error say what is in one that may be read."""
    cluster.up()
    member = cluster.member("b", "--data", "here")
    here, mine = cluster.folder / "here", cluster.folder / "mine"
    here.mkdir()
    (mine / "here").mkdir(parents=True)
    for path in ("/etc/passwd", "here/../a/node/node.key", str(cluster.folder / "b")):
        why = refused(cluster, offer_of("clicks", data=path))
        assert "on a file of its own" in why
    (here / "table.csv").write_text("SECRET1,SECRET2\nSECRET3,1\n")
    rows = "".join(f"{n % 7},{'yes' if n % 3 else 'no'}\n" for n in range(200))
    (mine / "here" / "table.csv").write_text(f"x,y\n{rows}")
    done = lockstep(
        "run", "clicks", "--data", "here/table.csv", "--label", "y", "--data-epochs", "1", "-q",
        "--on", "up", "--state", "../a", "--workers", "2", cwd=mine,
    )  # fmt: skip
    assert done.returncode != 0
    assert "host b" in done.stderr
    assert "SECRET" not in done.stderr
    member.until("SECRET")  # its operator sees it


def test_functions_of_an_allowed_module_are_not_called(cluster: Loopback) -> None:
    """One that was allowed by its full name is: `tests/job/test_code_archive.py`."""
    cluster.up()
    source = cluster.folder / "blobs.py"
    source.write_text(
        source.read_text()
        + f"\n\ndef touch(path='', **args):\n    open({str(cluster.folder / 'touched')!r}, 'w')\n"
        "    return Blobs(**args)\n"
    )
    member = cluster.member("b", "--allow", "blobs")
    run = ("run", "blobs:touch", "--data-epochs", "1", "-q", "--on", "up", "--state", "../a")
    mine = cluster.folder / "mine"
    mine.mkdir()
    shutil.copy(source, mine)
    (mine / "blobs.py").write_text(source.read_text().replace("    open(", "    print("))
    done = lockstep(*run, "--workers", "2", cwd=mine)
    assert "does not lead to a Task" in done.stderr
    assert not (cluster.folder / "touched").exists()
    member.end()


def test_errors_without_contents() -> None:
    error = DataError("line 3 of /x is no number: 'SECRET'", expected="SECRET", found="SECRET")
    said = without_contents(error)
    assert type(said) is DataError
    assert "SECRET" not in str(said)
    lost = PeerClosedError("host a closed the connection")
    assert without_contents(lost) is lost
