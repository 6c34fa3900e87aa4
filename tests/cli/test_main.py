"""The command line: results on stdout, everything else on stderr, and what a run leaves behind."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lockstep
from lockstep.errors import IntegrityError, JobError, RunFolderError
from lockstep.recipes.datasets import fetch
from tests.support import command
from tests.support.command import TASKS

MNIST = ["mnist", "--workers=2", "--shards=2", "--threads=1", "--data-epochs=2"]
MNIST_STEPS = 2 * 63
LEFT_BEHIND = {
    "manifest.json", "events.jsonl", "ledger.jsonl", "checkpoints", "model.safetensors",
    "result.json", "report.html",
}  # fmt: skip


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A run of the recipe: its folder, stdout and stderr."""
    fetch("mnist")
    folder = tmp_path_factory.mktemp("mnist")
    ended = command.lockstep("run", *MNIST, "--checkpoint-steps=50", "--json", cwd=folder)
    assert ended.returncode == 0, ended.stderr
    return folder / "runs" / "mnist-1", ended.stdout, ended.stderr


def test_versions(tmp_path: Path) -> None:
    ended = command.lockstep("--version", cwd=tmp_path)
    assert ended.stdout.startswith(f"lockstep {lockstep.__version__}, torch 2.")
    assert ended.returncode == 0


@pytest.fixture
def copy(mnist: tuple[Path, str, str], tmp_path: Path) -> Path:
    """A copy of the run, to alter."""
    return Path(shutil.copytree(mnist[0], tmp_path / "copy"))


def test_run_json(mnist: tuple[Path, str, str]) -> None:
    folder, stdout, stderr = mnist
    assert stdout.count("\n") == 1
    result = json.loads(stdout)
    assert result == json.loads((folder / "result.json").read_text())
    assert result["steps"] == MNIST_STEPS
    assert (result["workers"], result["shards"], result["recoveries"]) == (2, 2, [])
    assert result["samples_per_second"] > 0
    assert result["wall_seconds"] > result["startup_seconds"] > 0
    assert result["metrics"]["accuracy"] > 0.8
    assert [entry["step"] for entry in result["history"]] == [63, MNIST_STEPS]
    assert result["checkpoints"] == ["step-00000050", "step-00000100", "step-00000126"]
    assert result["fingerprint"] in (folder / "ledger.jsonl").read_text().splitlines()[-1]
    assert {path.name for path in folder.iterdir()} == LEFT_BEHIND
    assert f"{MNIST_STEPS}/{MNIST_STEPS}" in stderr  # progress


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A quiet run of a task in a file, with an argument: its folder, stdout and stderr."""
    folder = tmp_path_factory.mktemp("blobs")
    shutil.copy(TASKS, folder / "mine.py")
    ended = command.lockstep(
        "run", "mine.py:small_blobs", "--lr", "0.25", "--quiet", "--out=run", cwd=folder
    )
    assert ended.returncode == 0, ended.stderr
    return folder / "run", ended.stdout, ended.stderr


def test_run_quietly(blobs: tuple[Path, str, str]) -> None:
    """A file's function that returns a job brings its settings, and takes arguments."""
    folder, stdout, stderr = blobs
    assert stderr == ""
    shown = dict(line.split(maxsplit=1) for line in stdout.splitlines())
    result = json.loads((folder / "result.json").read_text())
    assert shown["fingerprint"] == result["fingerprint"]
    assert shown["folder"] == "run"
    assert shown.keys() >= {"loss", "accuracy", "train_loss", "speed", "time"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["source"]["args"] == {"lr": 0.25}
    assert manifest["plan"]["steps"] == 9
    assert manifest["plan"]["batch_size"] == 16


def test_plan_json(tmp_path: Path) -> None:
    """It takes every option that `run` takes."""
    more = ["--precision=bf16", "--clip-grad-norm=1", "--eval-batch-size=50"]
    ended = command.lockstep("plan", *MNIST, *more, "--json", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    plan = json.loads(ended.stdout)
    assert (plan["workers"], plan["shards"], plan["threads"]) == (2, 2, 1)
    assert (plan["steps"], plan["train_samples"]) == (MNIST_STEPS, 4000)
    assert (plan["precision"], plan["clip_grad_norm"]) == ("bf16", 1.0)
    assert plan["eval_batch_size"] == 50
    assert any("workers, threads, shards as asked" in reason for reason in plan["reasons"])
    assert list(tmp_path.iterdir()) == []


def test_plan_for_people(tmp_path: Path) -> None:
    """What most jobs have none of is shown where there is some."""
    ended = command.lockstep("plan", *MNIST, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    settings, reasons = ended.stdout.split("\nbecause\n")
    shown = dict(line.split(maxsplit=1) for line in settings.splitlines())
    assert shown["steps"] == str(MNIST_STEPS)
    assert shown["seed"] == "0"
    assert shown["clip_grad_norm"] == "-"
    assert not shown.keys() & {"groups", "servers", "faults", "holdings", "part"}
    assert "workers, threads, shards as asked" in reasons


def test_doctor_json(tmp_path: Path) -> None:
    ended = command.lockstep("doctor", "--json", cwd=tmp_path)
    checks = json.loads(ended.stdout)
    assert [check for check in checks if not check["good"]] == []
    assert ended.returncode == 0
    assert {check["name"] for check in checks} >= {"torch", "memory", "native path", "same bits"}
    assert list(tmp_path.iterdir()) == []


# Verify.


def test_verify_json(mnist: tuple[Path, str, str], tmp_path: Path) -> None:
    """On one worker, from the checkpoint before the steps that are asked for."""
    ended = command.lockstep(
        "verify", str(mnist[0]), "--workers=1", "--steps=110:", "--json", cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert (found["first"], found["last"], found["workers"]) == (100, MNIST_STEPS, 1)
    assert found["start"] == "step-00000100"
    assert found["final"] is True
    assert found["notes"] == []


def test_verify_from_the_seed(blobs: tuple[Path, str, str]) -> None:
    found = lockstep.verify(blobs[0], workers=1)
    assert (found.first, found.last, found.start, found.final) == (0, 9, "seed", True)


def test_verify_names_an_altered_ledger_line(copy: Path, tmp_path: Path) -> None:
    ledger = copy / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    assert '"step":17,' in lines[18]
    lines[18] = lines[18].replace('"samples":64', '"samples":65')
    ledger.write_text("".join(lines))
    ended = command.lockstep("verify", str(copy), cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith(
        f"lockstep: {ledger}: line 19 is not what was recorded (step 17)"
    )


def test_verify_names_a_missing_ledger_line(copy: Path) -> None:
    ledger = copy / "ledger.jsonl"
    lines = ledger.read_text().splitlines(keepends=True)
    del lines[18]
    ledger.write_text("".join(lines))
    with pytest.raises(IntegrityError, match=r"line 19 is not what was recorded \(step 18\)"):
        lockstep.verify(copy)


@pytest.mark.parametrize(
    ("file", "tensor"), [("model.safetensors", "bias"), ("state.safetensors", None)]
)
def test_verify_names_an_altered_tensor(copy: Path, file: str, tensor: str | None) -> None:
    path = copy / "checkpoints" / "step-00000050" / file
    altered = flip_a_bit(path, tensor)
    with pytest.raises(IntegrityError, match="is not what was written") as caught:
        lockstep.verify(copy)
    assert str(path) in caught.value.what
    assert f"(tensor {altered})" in caught.value.found


@pytest.mark.parametrize("tensor", ["0.weight", "1.bias"])
def test_verify_names_an_altered_tensor_of_the_model(
    tensor: str, blobs: tuple[Path, str, str], tmp_path: Path
) -> None:
    folder = shutil.copytree(blobs[0], tmp_path / "copy")
    flip_a_bit(folder / "model.safetensors", tensor)
    with pytest.raises(IntegrityError, match="is not what the run computed") as caught:
        lockstep.verify(folder, workers=1)
    assert str(folder / "model.safetensors") in caught.value.what
    assert f"(tensor {tensor})" in caught.value.found


def cut(ledger: Path) -> None:
    ledger.write_text("".join(ledger.read_text().splitlines(keepends=True)[:-3]))


def empty(ledger: Path) -> None:
    ledger.write_text("")


def change_seed(manifest: Path) -> None:
    text = manifest.read_text()
    assert text.count('"seed": 0') == 3
    manifest.write_text(text.replace('"seed": 0', '"seed": 1'))


def change_plan(manifest: Path) -> None:
    content = json.loads(manifest.read_text())
    content["plan"]["batch_size"] += 1
    manifest.write_text(json.dumps(content))


def change_result(result: Path) -> None:
    content = json.loads(result.read_text())
    content["fingerprint"] = content["fingerprint"][::-1]
    result.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "alter", "says"),
    [
        ("ledger.jsonl", cut, "result.json is not that of the ledger.*found:    step 6"),
        ("ledger.jsonl", empty, "ledger.jsonl is missing or empty"),
        ("ledger.jsonl", Path.unlink, "ledger.jsonl is missing or empty"),
        ("manifest.json", change_seed, "manifest.json is not the manifest that the run began"),
        ("manifest.json", change_plan, "manifest.json is not the .* identity in batch_size"),
        ("result.json", change_result, "result.json is not that of the ledger"),
        ("result.json", empty, "result.json is not readable"),
    ],
    ids=["cut", "empty", "no-ledger", "seed", "plan", "fingerprint", "no-result"],
)
def test_verify_names_what_does_not_fit_the_ledger(
    file: str,
    alter: Callable[[Path], None],
    says: str,
    blobs: tuple[Path, str, str],
    tmp_path: Path,
) -> None:
    """Before anything is started."""
    folder = shutil.copytree(blobs[0], tmp_path / "copy")
    alter(folder / file)
    with pytest.raises(IntegrityError, match=f"(?s){says}"):
        lockstep.verify(folder)


def flip_a_bit(path: Path, tensor: str | None) -> str:
    """Flip the lowest bit of a tensor's last byte (None: of the first in the file); its name."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    name = tensor or min(header)
    content[8 + length + header[name]["data_offsets"][1] - 1] ^= 1
    path.write_bytes(content)
    return name


def test_verify_names_what_other_code_changes(blobs: tuple[Path, str, str]) -> None:
    """The first step that differs, the tensors, and that it is the code that differs."""
    source = blobs[0].parent / "mine.py"
    text = source.read_text()
    assert text.count("lr=self.lr, momentum") == 1
    source.write_text(text.replace("lr=self.lr, momentum", "lr=self.lr * 1.01, momentum"))
    try:
        with pytest.raises(IntegrityError, match="differs from the ledger, first at step 0") as e:
            lockstep.verify(blobs[0])
    finally:
        source.write_text(text)
    assert e.value.found.endswith("tensors that differ: 0.weight")
    assert "source file is not the one that the run used" in e.value.fix


def test_verify_refuses_steps_that_were_not_recorded(blobs: tuple[Path, str, str]) -> None:
    with pytest.raises(JobError, match="steps 3:99 are not all recorded"):
        lockstep.verify(blobs[0], steps=(3, 99))


def test_verify_refuses_what_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is not a run folder"):
        lockstep.verify(tmp_path)


# Signals.


def test_sigterm_to_every_process_stops_with_a_checkpoint(tmp_path: Path) -> None:
    """As a service manager or a batch system sends it; what to do next is said."""
    arguments = ["run", f"{TASKS}:Blobs", "--workers=2", "--steps=1000000", "--out=run"]
    with subprocess.Popen(
        [sys.executable, "-m", "lockstep", *arguments],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        shown = next(line for line in process.stderr if "/1,000,000" in line)
        os.killpg(process.pid, signal.SIGTERM)
        stdout, stderr = process.communicate(timeout=command.LIMIT_SECONDS)
    assert process.returncode == 130, shown
    assert stdout == ""
    assert stderr.endswith(", as asked\n  next:     lockstep resume run\n")
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_an_interruption_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lockstep.cli import main as cli

    def interrupted() -> None:
        raise SystemExit(cli.INTERRUPTED)

    monkeypatch.setattr(cli, "app", interrupted)
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr() == ("", "lockstep: interrupted\n")


# Settings.


def test_every_setting_that_an_option_can_give_has_one() -> None:
    from lockstep.cli.main import plan, run
    from lockstep.job.job import SETTINGS

    own = {"ctx", "job", "on", "state", "dashboard", "measure", "tune", "quiet", "as_json"}
    for each in (run, plan):
        options = set(inspect.signature(each).parameters) - own
        without = {"evaluate", "keep_checkpoints", "cluster", "slice_plan"}
        assert set(SETTINGS) - options == without
        assert options <= set(SETTINGS)
