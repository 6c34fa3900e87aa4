"""The master dies, is stopped or finds damaged checkpoints: the run goes on to the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import lockstep
from lockstep.errors import RunFolderError, WorkerLostError
from tests.support.harmed_runs import Yard, assert_same, events, until, yard
from tests.support.master_processes import (
    PACED,
    SETTINGS,
    STEPS,
    Master,
    Start,
    master,
    processes_of,
    wanted,
)

__all__ = ["master", "wanted", "yard"]  # fixtures

ORPHAN_SECONDS = 2.0


def resume(folder: str | Path, workers: int | None = None) -> lockstep.Result:
    return lockstep.resume(folder, workers=workers, quiet=True)


def newest_checkpoint(folder: str | Path) -> Path:
    return max(Path(folder, "checkpoints").glob("step-*"))


# Killed.


def test_a_killed_master_leaves_nothing_and_its_run_goes_on(
    master: Start, wanted: lockstep.Result
) -> None:
    killed = master("--workers=3", "--checkpoint-steps=20")
    killed.await_step(60)
    killed.send(signal.SIGKILL)
    killed.end()
    assert killed.left(ORPHAN_SECONDS) == set()
    result = resume(killed.folder, workers=2)
    assert_same(result, wanted)
    (resumed,) = events(killed.folder, "resumed")
    assert resumed["step"] >= 40
    assert [entry["step"] for entry in result.history] == list(range(4, STEPS + 1, 4))


@pytest.mark.long
def test_killed_again_and_again(master: Start, wanted: lockstep.Result) -> None:
    """Also a resumed run can be killed, and one that has no checkpoint yet."""
    first = master("--workers=2", "--checkpoint-steps=40")
    first.await_step(4)
    first.send(signal.SIGKILL)
    first.end()
    for step, workers in ((60, 3), (120, 1)):
        command = ("resume", str(first.folder), f"--workers={workers}", "--quiet")
        again = master(*command, folder=str(first.folder))
        again.await_step(step)
        again.send(signal.SIGKILL)
        again.end()
        assert again.left(ORPHAN_SECONDS) == set()
    assert_same(resume(first.folder), wanted)
    assert [event["step"] for event in events(first.folder, "resumed")] >= [40]


@pytest.mark.long
def test_killed_while_a_checkpoint_is_being_written(master: Start, wanted: lockstep.Result) -> None:
    """Whether the kill hits the writing or just misses it: what is resumed from is whole."""
    killed = master("--workers=1", "--checkpoint-steps=2")
    killed.await_step(8)
    checkpoints = killed.folder / "checkpoints"
    until(lambda: list(checkpoints.glob(".partial-*")), 30, "a partial checkpoint")
    killed.send(signal.SIGKILL)
    killed.end()
    assert killed.left(ORPHAN_SECONDS) == set()
    assert_same(resume(killed.folder, workers=3), wanted)
    assert not list(checkpoints.glob(".partial-*"))


def test_the_forkserver_is_killed(master: Start, wanted: lockstep.Result) -> None:
    """All workers go with their parent. The master says so, and the run can be resumed."""
    running = master("--workers=2", "--checkpoint-steps=20")
    running.await_step(40)
    (forkserver,) = {parent(pid) for pid in running.workers().values()}
    os.kill(forkserver, signal.SIGKILL)
    code, said = running.end(20)
    assert code == WorkerLostError.exit_code
    assert "the forkserver" in said
    assert "Traceback" not in said
    assert running.left(ORPHAN_SECONDS) == set()
    assert_same(resume(running.folder), wanted)


def parent(pid: int) -> int:
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[1])


# Damaged checkpoints.


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after a while, with several checkpoints."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    settings = [f"--{k.replace('_', '-')}={v}" for k, v in SETTINGS.items()]
    running = Master(
        "run", PACED, *settings, "--workers=2", "--checkpoint-steps=20", "--quiet",
        f"--out={folder}", folder=folder,
    )  # fmt: skip
    try:
        running.await_step(80)
        running.send(signal.SIGTERM)
        assert running.end()[0] == 130
    finally:
        running.close()
    return folder


def tear(checkpoint: Path) -> None:
    with (checkpoint / "state.safetensors").open("r+b") as file:
        file.truncate(100)


def flip(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (checkpoint / "model.safetensors").write_bytes(content)


def lose_a_file(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [tear, flip, lose_a_file])
def test_a_damaged_checkpoint_is_named_and_passed_over(
    damage: object, stopped: Path, yard: Yard, wanted: lockstep.Result
) -> None:
    folder = Path(shutil.copytree(stopped, yard.path()))
    newest, before = sorted((folder / "checkpoints").glob("step-*"), reverse=True)[:2]
    assert callable(damage)
    damage(newest)
    result = resume(folder, workers=3)
    notes = [event["text"] for event in events(folder, "note")]
    assert any(newest.name in note for note in notes), notes
    (resumed,) = events(folder, "resumed")
    assert resumed["step"] == int(before.name.removeprefix("step-"))
    assert_same(result, wanted)


@pytest.mark.long
def test_all_checkpoints_are_gone(stopped: Path, yard: Yard, wanted: lockstep.Result) -> None:
    folder = Path(shutil.copytree(stopped, yard.path()))
    shutil.rmtree(folder / "checkpoints")
    assert_same(resume(folder), wanted)
    assert "from the beginning" in events(folder, "note")[-1]["text"]


def test_the_ledger_ends_before_the_newest_checkpoint(
    stopped: Path, yard: Yard, wanted: lockstep.Result
) -> None:
    """A checkpoint that the ledger does not confirm is not gone on with."""
    folder = Path(shutil.copytree(stopped, yard.path()))
    lines = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_bytes(b"".join(lines[:61]) + lines[61][:20])
    assert_same(resume(folder, workers=1), wanted)
    assert [event["step"] for event in events(folder, "resumed")] == [60]


# One master, and an end.


def test_a_finished_run_is_not_resumed(wanted: lockstep.Result) -> None:
    with pytest.raises(RunFolderError, match="has finished"):
        resume(wanted.folder)


def test_killed_between_the_last_checkpoint_and_the_result(
    yard: Yard, wanted: lockstep.Result
) -> None:
    """Nothing is left to be computed; the result is the same, and nothing is in it twice."""
    folder = Path(shutil.copytree(wanted.folder, yard.path()))
    (folder / "result.json").unlink()
    lines = (folder / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "ledger.jsonl").write_bytes(b"".join(lines[:-1]))
    assert_same(resume(folder, workers=2), wanted)


@pytest.mark.long
def test_two_masters(master: Start) -> None:
    running = master("--workers=1")
    running.await_step(4)
    with pytest.raises(RunFolderError, match="another master"):
        resume(running.folder)
    command = ("run", PACED, f"--out={running.folder}")
    second = master(*command, folder=str(running.folder))
    code, said = second.end()
    assert code == RunFolderError.exit_code
    assert "exists" in said
    assert running.process.poll() is None


# Signals.


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
def test_a_signal_stops_at_the_end_of_a_step(
    number: signal.Signals, master: Start, wanted: lockstep.Result
) -> None:
    running = master("--workers=2")
    running.await_step(20)
    running.send(number)
    code, said = running.end(20)
    assert code == 130
    assert "stopped after step" in said
    assert "Traceback" not in said
    assert running.left(ORPHAN_SECONDS) == set()
    step = int(newest_checkpoint(running.folder).name.removeprefix("step-"))
    recorded = [json.loads(line) for line in (running.folder / "ledger.jsonl").open()]
    assert recorded[-1]["step"] == step - 1, "the checkpoint is that of the last step"
    assert_same(resume(running.folder, workers=4), wanted)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.long)]
)
def test_a_signal_to_all_processes_stops_at_the_end_of_a_step(
    number: signal.Signals, master: Start, wanted: lockstep.Result
) -> None:
    """As service managers send it, or a terminal that is closed: only the master's business."""
    running = master("--workers=2", "--loaders=1")
    running.await_step(20)
    for pid in processes_of(running.mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    code, said = running.end(20)
    assert code == 130, said
    assert "stopped after step" in said
    assert running.left(ORPHAN_SECONDS) == set()
    assert not (running.folder / "control.sock").exists()
    assert_same(resume(running.folder, workers=1), wanted)


def test_a_second_signal_ends_it_at_once(master: Start) -> None:
    """Though a worker hangs, so that no step will end."""
    running = master("--workers=2", "--stall-seconds=300")
    running.await_step(8)
    os.kill(min(running.workers().values()), signal.SIGSTOP)
    running.send(signal.SIGINT)
    running.await_event(lambda event: event["event"] == "request", "the first signal")
    running.send(signal.SIGINT)
    code, said = running.end(10)
    assert code == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert running.left(ORPHAN_SECONDS) == set()


# Disks.


def test_a_full_disk(master: Start, wanted: lockstep.Result, tmp_path: Path) -> None:
    """Training goes on, or ends with a clear error; what had been written before stays good."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here: not root, or not allowed to")
    try:
        settings = [f"--{k.replace('_', '-')}={v}" for k, v in SETTINGS.items()]
        folder = place / "run"
        command = ["run", PACED, *settings, "--workers=2", "--checkpoint-steps=8", "--quiet"]
        running = master(*command, f"--out={folder}", folder=str(folder))
        code, said = running.end()
        assert "Traceback" not in said
        assert code == 1, said
        assert "No space left" in said
        assert running.left(ORPHAN_SECONDS) == set()
        rescued = Path(shutil.copytree(folder, tmp_path / "rescued"))
        assert list((rescued / "checkpoints").glob("step-*"))
        assert_same(resume(rescued), wanted)
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.long
def test_a_read_only_folder(master: Start, wanted: lockstep.Result, tmp_path: Path) -> None:
    """Nothing can be written, and that is said at once; later the run goes on."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=50m", "tmpfs", str(place)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here: not root, or not allowed to")
    try:
        settings = [f"--{k.replace('_', '-')}={v}" for k, v in SETTINGS.items()]
        folder = place / "run"
        command = ["run", PACED, *settings, "--workers=2", "--quiet", f"--out={folder}"]
        running = master(*command, folder=str(folder))
        running.await_step(8)
        running.send(signal.SIGTERM)
        assert running.end()[0] == 130
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        for refused in (["resume", str(folder)], ["run", PACED, f"--out={place / 'new'}"]):
            code, said = master(*refused, folder=str(folder)).end()
            assert code in (1, 2), said
            assert "Read-only file system" in said
            assert "Traceback" not in said
        subprocess.run(["mount", "-o", "remount,rw", str(place)], check=True)
        assert_same(resume(folder), wanted)
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.long
def test_checkpoints_cannot_be_written(master: Start, wanted: lockstep.Result) -> None:
    """Something is in the way of some checkpoints: that is told, and training goes on."""
    running = master("--workers=2", "--checkpoint-steps=20")
    running.await_event(lambda event: event["event"] == "checkpoint")
    checkpoints = running.folder / "checkpoints"
    kept = checkpoints.rename(running.folder / "elsewhere")
    checkpoints.write_text("in the way")
    failed = running.await_event(lambda event: event["event"] == "checkpoint_failed")
    checkpoints.unlink()
    kept.rename(checkpoints)
    code, said = running.end()
    assert code == 0, said
    assert f"step {failed['step']}" in failed["error"]
    assert_same(lockstep.Result.open(running.folder), wanted)
