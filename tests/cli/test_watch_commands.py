"""The commands that show runs on the terminal, and the page beside a run."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lockstep.cli.main import app
from lockstep.cli.watch_commands import page_beside
from lockstep.errors import JobError, RunFolderError
from tests.support import command
from tests.support.file_tree import ROOT
from tests.support.harmed_runs import until
from tests.support.recorded_runs import HOSTILE, began, line, make_run, pace, workers, write_ledger


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    going = [began(), *workers(1, [0, 1]), *pace(2, 10), line(3, "checkpoint", step=10)]
    make_run(tmp_path / "a", going)
    write_ledger(tmp_path / "a", [1.0, 0.5, 0.25], end=False)
    done = [*going, line(4, "finished", steps=100, fingerprint="ab" * 32)]
    make_run(tmp_path / "b", done, seed=3)
    write_ledger(tmp_path / "b", [1.0, 0.5, 0.125])
    (tmp_path / "b" / "result.json").write_text(
        json.dumps({"fingerprint": "ab" * 32, "steps": 100, "metrics": {"accuracy": 0.5}})
    )
    return tmp_path


Say = Callable[..., str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    def said(*words: str) -> str:
        app([*words], standalone_mode=False)
        return capsys.readouterr().out

    return said


def test_runs(runs: Path, say: Say) -> None:
    text = say("runs", str(runs))
    assert len(text.splitlines()) == 3
    assert "finished  100/100  accuracy 0.5" in text
    assert "running   10/100   loss 0.5" in text
    assert [row["status"] for row in json.loads(say("runs", str(runs), "--json"))] == [
        "finished", "running"
    ]  # fmt: skip
    with pytest.raises(RunFolderError):
        say("runs", str(runs / "none"))


def test_status(runs: Path, say: Say) -> None:
    text = say("status", str(runs / "a"))
    for expected in (
        "a, running", "10 of 100", "640 samples/s", "after step 10", "worker 0     working",
        "lockstep run mnist", "2 workers x 1 thread, 4 shards",
    ):  # fmt: skip
        assert expected in text, expected
    assert "ab" * 32 in say("status", str(runs / "b"))
    told = json.loads(say("status", str(runs / "a"), "--json"))
    assert told["status"] == "running"
    with pytest.raises(JobError):
        say("status", str(runs / "none"))


def test_compare(runs: Path, say: Say) -> None:
    text = say("compare", str(runs / "a"), str(runs / "b"))
    assert "setting seed  0" in text
    assert "equal up to step 2; there: loss 0.25 and 0.125" in text
    assert "equal in all 3 steps" in say("compare", str(runs / "a"), str(runs / "a"))
    told = json.loads(say("compare", str(runs / "a"), str(runs / "b"), "--json"))
    assert told["parting"]["step"] == 2


def test_nothing_that_files_say_moves_the_cursor(tmp_path: Path, say: Say) -> None:
    make_run(tmp_path / "a", [began(command=["\x1b[2J", HOSTILE]), *workers(1, [0], host="\x1b[A")])
    for words in (("runs", str(tmp_path)), ("status", str(tmp_path / "a"))):
        assert "\x1b" not in say(*words)


def test_the_page_goes_with_its_run(runs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn", reason="the extra dashboard is not installed")
    address = runs / "a" / "dashboard.url"
    with page_beside(True) as control:
        assert control is not None
        control.open(runs / "a", 4)
        until(address.exists, 30, "the page")
        assert address.stat().st_mode & 0o777 == 0o600
        until(lambda: address.read_text() in capfd.readouterr().err, 10, "the address")
    assert not address.exists()
    with page_beside(False) as control:
        assert control is None


def test_a_page_dies_with_the_run_that_is_killed(runs: Path) -> None:
    pytest.importorskip("uvicorn", reason="the extra dashboard is not installed")
    script = f"""
import os, time
from pathlib import Path
from lockstep.cli.watch_commands import page_beside
with page_beside(True) as control:
    control.open(Path({str(runs / "a")!r}), 4)
    time.sleep(60)
"""
    import subprocess

    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        until((runs / "a" / "dashboard.url").exists, 30, "the page")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
        process.wait()
        until(lambda: not any(_lives(int(pid)) for pid in children), 10, "the end of the page")
        assert children
    finally:
        process.kill()
        process.wait()


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_page_is_served_until_it_is_interrupted(runs: Path) -> None:
    pytest.importorskip("uvicorn", reason="the extra dashboard is not installed")
    ended = command.python(
        "-c",
        "import os, signal, threading\n"
        "from lockstep.cli import main\n"
        "threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        f"import sys; sys.argv = ['lockstep', 'watch', {str(runs)!r}]\n"
        "main.main()",
        cwd=ROOT,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("page         http://127.0.0.1:")
    assert not (runs / "dashboard.url").exists()
