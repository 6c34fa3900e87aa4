"""Code that the master sends: what is packed, who takes it, and that nothing else is unpacked."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lockstep as package
from lockstep.agent.job_offer import OFFER, JobOffer
from lockstep.cluster.daemon.admission import Allowed, refusal
from lockstep.errors import IntegrityError, JobError
from lockstep.job.code_archive import MAX_SOURCE, pack, unpack
from lockstep.job.task_resolution import resolve
from lockstep.job.task_source import TaskSource
from lockstep.net.blob_transfer import BlobInfo, BlobServer
from lockstep.system.messages import encode
from tests.cluster.test_daemon import RUN, alone, waiting_agent
from tests.support.agents_on_loopback import Agents
from tests.support.command import TASKS, lockstep
from tests.support.daemons import LIMIT
from tests.support.loopback_cluster import Loopback, cluster
from tests.support.tls_hosts import Cluster

__all__ = ["alone", "cluster"]  # fixtures

FILES = {
    "mine/__init__.py": "",
    "mine/tasks.py": "from mine.inner import parts\n",
    "mine/inner/parts.py": "WIDTH = 8\n",
}
OTHERS = {"mine/data.csv": "1,2\n", "mine/not-a-module.py": "", "mine/.hidden/x.py": ""}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package in it, and the working directory."""
    write(tmp_path, {**FILES, **OTHERS})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


# What is packed.


def test_the_same_sources_give_the_same_bytes(
    here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pack("mine.tasks:Task")
    assert first.task == "mine.tasks:Task"
    assert first.files == {name: len(text) for name, text in FILES.items()}
    other = tmp_path_factory.mktemp("other")
    write(other, dict(reversed(FILES.items())))
    (other / "mine/tasks.py").chmod(0o755)
    os.utime(other / "mine/tasks.py", (1, 1))
    monkeypatch.chdir(other)
    again = pack("mine.inner.parts:Else")
    assert again.data == first.data
    (other / "mine/tasks.py").write_text("pass\n")
    assert pack("mine").digest != first.digest


def test_what_was_packed_is_unpacked(here: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unpacked"
    folder.mkdir()
    unpack(pack("mine").data, folder)
    found = {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}
    assert found == FILES


def test_a_file_by_itself(here: Path) -> None:
    (here / "alone.py").write_text("x = 1\n")
    for name in ("alone.py:Task", "alone:Task", str(here / "alone.py:Task")):
        assert pack(name).files == {"alone.py": 6}
        assert pack(name).task == "alone:Task"


def link_a_file(here: Path) -> None:
    (here / "mine/linked.py").symlink_to("tasks.py")


def link_a_folder(here: Path) -> None:
    (here / "mine/linked").symlink_to("inner")


def a_long_file(here: Path) -> None:
    (here / "mine/long.py").write_text("#" * (MAX_SOURCE + 1))


def a_long_path(here: Path) -> None:
    write(here / "mine", {"/".join(["a" * 90] * 3) + ".py": ""})


@pytest.mark.parametrize("harm", [link_a_file, link_a_folder, a_long_file, a_long_path])
def test_what_cannot_be_packed(here: Path, harm: Callable[[Path], None]) -> None:
    harm(here)
    with pytest.raises(JobError):
        pack("mine.tasks:Task")


@pytest.mark.parametrize("name", ["nowhere", "sys:Task", "no-name.py:Task", "nowhere.py:Task"])
def test_what_is_not_there(here: Path, name: str) -> None:
    (here / "no-name.py").write_text("")
    with pytest.raises(JobError):
        pack(name)


# What is unpacked.


def archive(*entries: tuple[str, bytes], mode: str = "w", **changes: Any) -> bytes:
    """A tar file that is not as `pack` makes them."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in changes.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


HARMLESS = archive(("a.py", b"1"))
ALTERED = {
    "leaves the folder": archive(("../a.py", b"1")),
    "leaves it further down": archive(("mine/../../a.py", b"1")),
    "absolute": archive(("/tmp/a.py", b"1")),
    "empty part": archive(("mine//a.py", b"1")),
    "no module": archive(("a.so", b"1")),
    "a link": archive(("a.py", b""), type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a hard link": archive(("a.py", b""), type=tarfile.LNKTYPE, linkname="b.py"),
    "a device": archive(("a.py", b""), type=tarfile.CHRTYPE),
    "a folder": archive(("a.py", b""), type=tarfile.DIRTYPE),
    "twice": archive(("a.py", b"1"), ("a.py", b"2")),
    "out of order": archive(("b.py", b"1"), ("a.py", b"2")),
    "of an owner": archive(("a.py", b"1"), uid=1),
    "compressed": archive(("a.py", b"1"), mode="w:gz"),
    "longer": HARMLESS + bytes(512),
    "cut": HARMLESS[:600],
    "empty": archive(),
    "nothing": b"",
}


@pytest.mark.parametrize("data", ALTERED.values(), ids=ALTERED.keys())
def test_nothing_else_is_unpacked(tmp_path: Path, data: bytes) -> None:
    folder = tmp_path / "inner"
    folder.mkdir()
    with pytest.raises(IntegrityError):
        unpack(data, folder)
    assert list(tmp_path.rglob("*")) == [folder]


def test_the_plain_form_is_unpacked(tmp_path: Path) -> None:
    """So that the test above shows what it says: this differs from them in nothing else."""
    unpack(HARMLESS, tmp_path)
    assert (tmp_path / "a.py").read_bytes() == b"1"


@given(at=st.integers(0, len(HARMLESS) - 1), bit=st.integers(0, 7))
def test_flipped_bits_stay_inside(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
) -> None:
    outer = tmp_path_factory.mktemp("outer")
    (folder := outer / "inner").mkdir()
    data = bytearray(HARMLESS)
    data[at] ^= 1 << bit
    try:
        unpack(bytes(data), folder)
    except IntegrityError:
        assert not list(folder.iterdir())
    assert list(outer.iterdir()) == [folder]
    assert not any(path.is_symlink() for path in folder.rglob("*"))


# What an offered name may lead to.


@pytest.mark.parametrize(
    "name", ["os.system", "subprocess.run", "Path", "functional.cross_entropy"]
)
def test_names_that_lead_out_of_a_module(name: str) -> None:
    with pytest.raises(JobError, match="leads out of the module"):
        resolve(TaskSource(name=f"tests.support.named_tasks:{name}", offered=True))


def test_names_of_a_module(here: Path) -> None:
    task, _ = resolve(
        TaskSource(name="tests.support.named_tasks:Blobs", args={"lr": 0.5}, offered=True)
    )
    assert task.lr == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["small_blobs", "blobs", "look_up"])
def test_functions_of_a_package_that_was_allowed(name: str) -> None:
    """Only a Task is called, unless the function itself was named."""
    named = f"tests.support.named_tasks:{name}"
    with pytest.raises(JobError, match="does not lead to a Task"):
        resolve(TaskSource(name=named, offered=True, functions=False))
    task, _ = resolve(
        TaskSource(name="tests.support.named_tasks:Blobs", offered=True, functions=False)
    )
    assert type(task).__name__ == "Blobs"
    if name == "small_blobs":
        assert resolve(TaskSource(name=named, offered=True))[1] is not None


@pytest.mark.parametrize(
    "name", ["digits.py:Digits", "..digits:Digits", "code/../digits:Digits", "digits.*:Digits"]
)
def test_paths_that_lead_out_of_the_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is another file of this name where `join` was started."""
    ran = tmp_path / "ran"
    (tmp_path / "digits.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Digits: pass\n")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "digits.py").write_text("class Digits: pass\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError, match="is not in the code that was shipped"):
        resolve(TaskSource(name=name, folder=str(tmp_path / "code"), offered=True))
    assert not ran.exists()


def test_a_module_that_was_loaded_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, other = tmp_path / "code", tmp_path / "other"
    for folder in (code, other):
        folder.mkdir()
        (folder / "twice_there.py").write_text("class Digits: pass\n")
    monkeypatch.setattr(sys, "path", [str(other), *sys.path])
    with pytest.raises(JobError, match="is not in the code that was shipped"):
        resolve(TaskSource(name="twice_there:Digits", folder=str(code), offered=True))
    sys.modules.pop("twice_there", None)


@pytest.mark.parametrize("name", ["os:system", "torch:load", "elsewhere:Task"])
def test_modules_that_were_not_shipped(here: Path, name: str) -> None:
    with pytest.raises(JobError, match="is not in the code that was shipped"):
        resolve(TaskSource(name=name, folder=str(here), offered=True))


# Who takes it.

BILL = BlobInfo(digest="ab" * 32, nbytes=10)


def an_offer(task: str, blob: BlobInfo | None = BILL) -> JobOffer:
    return JobOffer(job="job", master="a", address=("127.0.0.1", 9), task=task, code=blob)


def test_which_code_a_host_takes() -> None:
    allowed = Allowed(modules=("mine",), code=(BILL.digest,))
    assert refusal(an_offer("mine:Task"), allowed, "b") is None
    for offer, rules in (
        (an_offer("mine:Task"), Allowed(modules=("mine", "mine:Task"))),  # its name says nothing
        (an_offer("mnist"), Allowed()),
        (an_offer("mine:Task"), Allowed(code=("cd" * 32,))),
        (an_offer("mine:Task", BlobInfo(digest=BILL.digest, nbytes=1 << 30)), allowed),
    ):
        error = refusal(offer, rules, "b")
        assert isinstance(error, JobError)
        assert "host b does not take the code" in error.what
    assert f"--allow-code {BILL.digest}" in str(refusal(an_offer("mine:Task"), Allowed(), "b"))


def test_offers_with_code() -> None:
    for blob in (BILL, None):
        assert OFFER.decode(encode(an_offer("mine:Task", blob))).code == blob


def of_the_master(cluster: Loopback) -> Path:
    """A folder that only the master has, with the task."""
    mine = cluster.folder / "mine"
    mine.mkdir()
    shutil.move(cluster.folder / "blobs.py", mine)
    return mine


@pytest.mark.long
def test_code_reaches_the_hosts_that_allow_it(cluster: Loopback, alone: str) -> None:
    mine = of_the_master(cluster)
    packed = json.loads(lockstep("pack", "blobs:Blobs", "--json", cwd=mine).stdout)
    assert packed["files"] == {"blobs.py": TASKS.stat().st_size}
    plain = lockstep("pack", "blobs.py:Blobs", cwd=mine).stdout.splitlines()
    assert plain[0] == packed["digest"]
    cluster.up()
    taking = cluster.member("b", "--allow-code", packed["digest"])
    cluster.member("c", "--allow", "blobs")
    on = ("--on", "up", "--state", "../a", "--workers", "3", "--json", "-q", "--ship-code")
    done = lockstep(*RUN, *on, "--out", "run", cwd=mine)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fingerprint"] == alone
    assert f"lockstep join --allow-code {packed['digest']}" in done.stderr
    events = [json.loads(line) for line in (mine / "run/events.jsonl").open()]
    assert [each["hosts"] for each in events if each["event"] == "hosts"][-1] == ["a", "b"]
    taking.until("its agent has ended")
    assert not list((cluster.folder / "b" / "code").iterdir())
    assert taking.end() == 0
    assert not (cluster.folder / "b" / "code").exists()


def test_code_goes_with_whoever_was_killed(cluster: Loopback) -> None:
    """With the agent, and with the host when it comes back."""
    cluster.up()
    member = cluster.member("b", "--allow-code", BILL.digest)
    code = cluster.folder / "b" / "code"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT)
        for job in ("one", "two"):
            offer = JobOffer(
                job=job, master="a", address=listener.getsockname(), task="x:Y", code=BILL
            )
            with cluster.launcher() as launcher:
                assert launcher.offer(offer) == ("b",)
                agent = waiting_agent(member, listener)
                (first,) = code.iterdir()
                os.kill(agent, signal.SIGKILL)
                agent = waiting_agent(member, listener)  # the next one
                (second,) = code.iterdir()
                assert second != first
                if job == "two":
                    member.end(signal.SIGKILL)
            if job == "one":
                member.until("is not offered any more")
                os.kill(agent, signal.SIGKILL)
                member.until("its agent has ended")
                assert not list(code.iterdir())
    assert len(list(code.iterdir())) == 1
    back = cluster.start("join", "--state", "b")
    back.until("waits for jobs")
    assert not list(code.iterdir())


def test_recipes_and_digests_that_are_none(tmp_path: Path) -> None:
    for command, found in (
        (("join", "--state", "b", "--allow-code", "12"), "does not have a digest"),
        (("pack", "nowhere:Task"), "there is no module nowhere"),
    ):
        done = lockstep(*command, cwd=tmp_path)
        assert done.returncode == 2
        assert found in done.stderr


# On the way.


@pytest.fixture
def run_shipped(tmp_path: Path) -> Callable[..., package.Result]:
    """Runs the task of a file that only the master has, with its code sent to another host."""
    shutil.copy(TASKS, tmp_path / "blobs.py")

    def run(on: Agents, task: str = "") -> package.Result:
        return package.run(
            task or f"{tmp_path / 'blobs.py'}:Blobs", on=on, workers=2, shards=3, threads=1,
            steps=5, batch_size=16, quiet=True, out=str(tmp_path / "run"), ship_code=True,
        )  # fmt: skip

    return run


def test_a_file_reaches_a_host(
    tmp_path: Path, run_shipped: Callable[..., package.Result], alone: str
) -> None:
    on = Agents(Cluster(tmp_path / "site"), {"b": 1})
    assert run_shipped(on).fingerprint == alone
    assert on.wait() == {"b": 0}
    assert [path.name for path in on.code("b").glob("*.py")] == ["blobs.py"]


def test_code_that_is_altered_on_the_way(
    tmp_path: Path, run_shipped: Callable[..., package.Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    put = BlobServer.put

    def altered(self: BlobServer, hold: Any, content: bytes) -> None:
        put(self, hold, content.replace(b"dropout", b"DROPOUT", 1))

    monkeypatch.setattr(BlobServer, "put", altered)
    on = Agents(Cluster(tmp_path / "site"), {"b": 1})
    with pytest.raises(IntegrityError, match="host b: the code that host master has sent"):
        run_shipped(on)
    assert on.wait() == {"b": 1}
    assert not list(on.code("b").iterdir())


def test_a_recipe_has_no_code_to_be_shipped(
    tmp_path: Path, run_shipped: Callable[..., package.Result]
) -> None:
    on = Agents(Cluster(tmp_path / "site"), {"b": 1})
    with pytest.raises(JobError, match="is a recipe"):
        run_shipped(on, "mnist")
    assert not on.processes
