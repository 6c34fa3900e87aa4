"""Tasks by every kind of name and from live objects: one task, one fingerprint, and its result."""

from __future__ import annotations

import atexit
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file
from torch.utils.data import Dataset

import lockstep
from lockstep.errors import JobError, TaskError
from lockstep.job.code_digest import code_digest
from lockstep.job.task_resolution import resolve
from lockstep.job.task_source import TaskSource
from lockstep.planning.eval_batches import combine
from tests.support import command
from tests.support.command import TASKS
from tests.support.named_tasks import BATCH, HELD_OUT, Blobs

SETTINGS: dict[str, Any] = {
    "workers": 2, "shards": 2, "threads": 1, "batch_size": BATCH, "steps": 9
}  # fmt: skip
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
LR = 0.25

SCRIPT = f"""
print("the script's own line")
result = lockstep.run(Blobs({LR}), quiet=True, out="run", **{SETTINGS!r})
model = result.model()
print(result.fingerprint)
"""
"""What follows the task's own text, with no guard around it."""


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> lockstep.Result:
    """The run that the others are compared with: a task in a file, on one worker."""
    out = tmp_path_factory.mktemp("sources") / "run"
    settings = {**SETTINGS, "workers": 1, "eval_batch_size": 7}
    task = f"{TASKS}:Blobs"
    return lockstep.run(task, args={"lr": LR}, out=str(out), quiet=True, **settings)


def test_module(result: lockstep.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`module:Task` is looked for in the current folder too."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "mine.py").write_text(TASKS.read_text())
    monkeypatch.chdir(tmp_path)
    again = lockstep.run("project.mine:Blobs", args={"lr": LR}, quiet=True, **SETTINGS)
    assert again.fingerprint == result.fingerprint
    assert again.folder == Path("runs/blobs-1")


def test_job_file(result: lockstep.Result, tmp_path: Path) -> None:
    """A task that is a file is looked for beside the job file; flags come before its settings."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "mine.py").write_text(TASKS.read_text())
    settings = "".join(f"{name}: {value}\n" for name, value in SETTINGS.items() if name != "steps")
    job = f"task: mine.py:Blobs\nargs: {{lr: {LR}}}\nsteps: 1000\n{settings}"
    (tmp_path / "project" / "job.yaml").write_text(job)
    ended = command.lockstep(
        "run", "project/job.yaml", "--steps=9", "--json", "--quiet", cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["fingerprint"] == result.fingerprint


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A script that has run: its path, and what it printed."""
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(TASKS.read_text() + SCRIPT)
    ended = command.python("script.py", cwd=path.parent)
    assert ended.returncode == 0, ended.stderr
    return path, ended.stdout


def test_script_without_a_guard(result: lockstep.Result, script: tuple[Path, str]) -> None:
    path, stdout = script
    assert stdout.splitlines() == ["the script's own line", result.fingerprint]
    manifest = json.loads((path.parent / "run" / "manifest.json").read_text())
    assert manifest["source"] == {"name": f"{path}:Blobs", "args": {}, "importable": False}


def test_the_manifest_has_the_digest_of_a_script(script: tuple[Path, str]) -> None:
    path, _ = script
    manifest = json.loads((path.parent / "run" / "manifest.json").read_text())
    assert manifest["code"] == blake3(path.read_bytes()).hexdigest()[:32]


@pytest.mark.long
def test_interactive(result: lockstep.Result, tmp_path: Path) -> None:
    """As in a notebook: `__main__` has no file, and the code comes as text."""
    ended = command.python("-", cwd=tmp_path, script=TASKS.read_text() + SCRIPT)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == result.fingerprint
    with pytest.raises(JobError, match="handed over as an object") as caught:
        lockstep.verify(tmp_path / "run")
    assert "task=Blobs(...)" in caught.value.fix
    assert lockstep.verify(tmp_path / "run", task=Blobs(LR)).final


def test_what_is_asked_for_last_counts() -> None:
    """`data_epochs` from the caller, though the recipe has `steps`."""
    assert lockstep.plan(f"{TASKS}:small_blobs", data_epochs=2).steps == 14


def test_a_task_that_asks_for_threads(run_folder: str) -> None:
    """Its workers do not wait for threads that stayed behind in the process they come from."""
    settings = {**SETTINGS, "workers": 1, "threads": 2, "steps": 2, "stall_seconds": 20}
    result = lockstep.run(f"{TASKS}:AsksForThreads", quiet=True, out=run_folder, **settings)
    assert (result.steps, result.recoveries) == (2, [])


class Leaves(Blobs):
    """Has something to do when the process in which its data were made ends."""

    def __init__(self, note: Path) -> None:
        super().__init__(LR)
        self.note = note

    def train_data(self) -> Dataset[Any]:
        atexit.register(self.note.write_text, "done")
        return super().train_data()


def test_what_a_task_leaves_for_the_end_is_done(run_folder: str, tmp_path: Path) -> None:
    """A forkserver ends at once, but after the handlers that the task's code has registered."""
    lockstep.run(Leaves(tmp_path / "note"), quiet=True, out=run_folder, **SETTINGS)
    assert (tmp_path / "note").read_text() == "done"


# The result.


def test_the_model_has_the_metrics(result: lockstep.Result) -> None:
    """`result.model()` is the trained module: it repeats the metrics, bit for bit."""
    task, model = Blobs(), result.model()
    assert not model.training
    points, labels = task.eval_data().tensors  # type: ignore[union-attr]
    sums = []
    threads = torch.get_num_threads()
    torch.set_num_threads(result.threads)
    try:
        with torch.no_grad():
            for batch, first in enumerate(range(0, HELD_OUT, 7)):
                span = slice(first, first + 7)
                found = task.metrics(model, (points[span], labels[span]))
                summed = {name: value.double().sum().item() for name, value in found.items()}
                samples = len(labels[span])
                sums.append({"batch": batch, "samples": samples, "sums": summed})
    finally:
        torch.set_num_threads(threads)
    metrics = {**combine(sums), "train_loss": result.metrics["train_loss"]}
    assert metrics == result.metrics


def test_the_weights_load_into_the_plain_module(result: lockstep.Result) -> None:
    plain = Blobs().model()
    weights = load_file(result.folder / "model.safetensors")
    assert weights.keys() == plain.state_dict().keys()
    plain.load_state_dict(weights)
    trained = result.model().state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(value, trained[name]), name


def test_a_result_is_opened_again(result: lockstep.Result) -> None:
    opened = lockstep.Result.open(result.folder)
    assert opened == result
    for name, value in result.model().state_dict().items():
        assert torch.equal(value, opened.model().state_dict()[name]), name


# Names.


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a test import files of its own without a trace."""
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "modules", sys.modules.copy())


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("attribute", "args", "lr", "steps"),
    [
        ("Blobs", {}, 0.1, None),
        ("Blobs", {"lr": 2}, 2, None),
        ("small_blobs", {"lr": 3}, 3, 9),
        ("READY", {}, 4, None),
        ("Inside.task", {}, 5, None),
    ],
)
def test_what_a_name_may_lead_to(
    attribute: str, args: dict[str, Any], lr: float, steps: int | None, tmp_path: Path
) -> None:
    """A class, a function that returns a job, or an object, also inside another."""
    more = "\nREADY = Blobs(4)\nclass Inside:\n    task = Blobs(5)\n"
    (tmp_path / "mine.py").write_text(TASKS.read_text() + more)
    task, job = resolve(TaskSource(name=f"{tmp_path}/mine.py:{attribute}", args=args))
    assert vars(task)["lr"] == lr
    assert (job.steps if job else None) == steps


@pytest.mark.usefixtures("forgotten")
def test_a_function_is_part_of_the_code(tmp_path: Path) -> None:
    """Where it returns a task of a class from elsewhere, its file is all that the user wrote."""
    digests = []
    for lr in (1, 1, 2):
        text = f"from tests.support.named_tasks import Blobs\ndef task():\n    return Blobs({lr})\n"
        (tmp_path / "mine.py").write_text(text)
        task, _ = resolve(TaskSource(name=f"{tmp_path}/mine.py:task"))
        digests.append(code_digest(task))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("{}/mine.py:Blob", JobError, "there is no Blob in .*\n.*one of: Blobs, .*NoLoss,"),
        ("{}/none.py:Blobs", JobError, "there is no file"),
        ("no_such_module:Blobs", JobError, "there is no module no_such_module"),
        ("{}/mine.py:BATCH", JobError, "does not lead to a task"),
        ("{}/mine.py:NothingButAModel", TaskError, "has no train_data and no loss"),
        (
            "minst",
            JobError,
            "there is no such recipe\n  expected: .*clicks or .*mnist or .*\n  found:    'minst'",
        ),
    ],
)
def test_names_that_lead_nowhere(
    name: str, kind: type[Exception], says: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(TASKS.read_text())
    with pytest.raises(kind, match=says):
        resolve(TaskSource(name=name.format(tmp_path)))


@pytest.mark.parametrize("name", ["mine:Blobs", "mine.py:Blobs", f"{TASKS}:Blobs"])
def test_a_working_folder_that_is_gone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        with pytest.raises(JobError, match="the folder that this process works in is gone"):
            lockstep.run(name, out=str(tmp_path / "run"), quiet=True, **SETTINGS)
    assert not (tmp_path / "run").exists()


# Imports.


@pytest.mark.parametrize(
    "what", ["import lockstep", "import lockstep; lockstep.Task, lockstep.Job"]
)
def test_importing_the_package_imports_nothing_heavy(what: str, tmp_path: Path) -> None:
    ended = command.python("-X", "importtime", "-c", what, cwd=tmp_path)
    assert ended.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "lockstep" in imported
    assert imported.isdisjoint({"torch", "numpy", "typer", "rich", "yaml", "cloudpickle"})


def test_help_does_not_wait_for_torch(tmp_path: Path) -> None:
    ended = command.python("-X", "importtime", "-m", "lockstep", "run", "--help", cwd=tmp_path)
    assert ended.returncode == 0
    assert "--workers" in ended.stdout
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert imported.isdisjoint({"torch", "numpy"})


def test_a_master_does_not_import_torch(tmp_path: Path) -> None:
    """Its forkserver does, and it would take as long again."""
    code = (
        "import sys, lockstep, lockstep.agent.agent, lockstep.cluster.daemon.head;"
        "lockstep.run('tests.support.paced_task:Paced', workers=1, batch_size=48,"
        " steps=2, quiet=True, out=sys.argv[1]);"
        "sys.exit('torch' in sys.modules)"
    )
    ended = command.python("-c", code, str(tmp_path / "run"), cwd=TASKS.parents[2])
    assert ended.returncode == 0, ended.stderr
