"""Whatever is wrong with a job: one message that says what to do, and nothing left behind.

(That nothing is left behind is what the fixture in conftest.py checks, after each test.)
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lockstep
from lockstep import errors
from lockstep.errors import LockstepError
from lockstep.job.faults import Fault
from lockstep.job.job import Job
from lockstep.job.job_file import read_job_file
from lockstep.job.task_source import source_of
from lockstep.results.checkpoint import list_checkpoints, open_checkpoint
from lockstep.results.run_folder import RunFolder
from lockstep.system.machine import available_bytes
from lockstep.system.seeding import derive
from lockstep.worker import build_state as building
from tests.support import command
from tests.support.command import TASKS
from tests.support.named_tasks import BATCH, SAMPLES, Blobs, Poisoned

SETTINGS: dict[str, Any] = {
    "workers": 2, "shards": 2, "threads": 1, "batch_size": BATCH, "steps": 7
}  # fmt: skip
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A task that cannot be run, and what is said about it."""

    kind: type[LockstepError]
    says: tuple[str, ...]
    """Parts of the message."""
    args: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    starts: bool = False
    """Whether it shows only when workers compute: then there is a run folder."""


TOO_MUCH = available_bytes() * 3 // 2
"""Bytes."""

CASES = {
    "NoLoss": Case(
        kind=errors.TaskError,
        says=("the task NoLoss has no loss\n", "def loss(self, model, batch)", "class NoLoss"),
    ),
    "LossPerSample": Case(
        kind=errors.TaskError,
        says=("did not return a loss", "one element", "shape (8,)"),
        starts=True,
    ),
    "ComplexLoss": Case(
        kind=errors.TaskError,
        says=("did not return a loss", "a real tensor", "torch.complex64"),
        starts=True,
    ),
    "LossWithoutGraph": Case(
        kind=errors.TaskError,
        says=("did not return a loss", "with a graph", "requires_grad=False"),
        starts=True,
    ),
    "PenaltyWithoutMetrics": Case(
        kind=errors.TaskError,
        says=("error while evaluating", "Task.metrics is not defined", "without gradients"),
        starts=True,
    ),
    "MetricsOfAnotherShape": Case(
        kind=errors.TaskError,
        says=("the metric 'scores' has a shape", "one per sample: shape (1", ", 3)", "their mean"),
        starts=True,
    ),
    "MetricsOfNoNames": Case(
        kind=errors.TaskError,
        says=("Task.metrics did not return a mapping", "torch.Tensor"),
        starts=True,
    ),
    "MetricsOfWords": Case(
        kind=errors.TaskError,
        says=("the metric 'verdict' is not a number", "'good'"),
        starts=True,
    ),
    "MetricsOfOtherNames": Case(
        kind=errors.TaskError,
        says=("other metrics for batch 1 than for batch 0", "accuracy_of_rest", "the same keys"),
        starts=True,
    ),
    "NoSamples": Case(kind=errors.DataError, says=("train_data() returned an empty data set",)),
    "Stream": Case(
        kind=errors.DataError,
        says=("train_data() did not return a map-style data set", "__len__", "Endless"),
    ),
    "StreamOfKnownLength": Case(
        kind=errors.DataError,
        says=("train_data() did not return a map-style data set", "indexed from 0"),
    ),
    "Batches": Case(
        kind=errors.DataError,
        says=("train_data() did not return a map-style data set", "DataLoader", "itself"),
    ),
    "Blobs": Case(
        kind=errors.DataError,
        says=("the training set is shorter than one batch", "batch_size = 101", "100 or fewer"),
        settings={"batch_size": SAMPLES + 1},
    ),
    "Large": Case(
        kind=errors.ResourceError,
        says=("not enough memory for the run's shared memory", "MiB available", "fewer shards"),
        args={"rows": TOO_MUCH // (SAMPLES * 64 * 4)},
        settings={"shards": SAMPLES, "batch_size": SAMPLES},
    ),
    "SparseGradients": Case(
        kind=errors.TaskError,
        says=("the gradient of 0.weight is sparse", "a dense gradient", "make it dense"),
        starts=True,
    ),
    "WantsAClosure": Case(
        kind=errors.OptimizerError,
        says=("LBFGS cannot be run by owners of blocks", "no closure", "AdamW"),
    ),
    "ForeignTensor": Case(
        kind=errors.OptimizerError,
        says=("a tensor that is not a parameter", "shape (3, 5) in group 0", "`params` alone"),
    ),
    "DiesWhileLoading": Case(
        kind=errors.WorkerLostError,
        says=("the parent of all workers, has ended", "it exited with code 7", "os._exit"),
    ),
    "LeavesInTheLoss": Case(
        kind=errors.TaskError,
        says=("error while computing step 0", "raise SystemExit", "enough"),
        starts=True,
    ),
    "HidesAMethod": Case(
        kind=errors.TaskError,
        says=("an attribute loss, which hides the method loss()", "CrossEntropyLoss"),
    ),
    "StepsByTheBatch": Case(
        kind=errors.TaskError,
        says=("scheduler_interval of StepsByTheBatch", "step or data_epoch", "'batch'"),
    ),
    "LeavesWhileLoading": Case(
        kind=errors.TaskError,
        says=("error while loading", "raise SystemExit", "I would rather not"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_message(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    settings = {**SETTINGS, **case.settings, "quiet": True}
    with pytest.raises(LockstepError) as caught:
        lockstep.run(f"{TASKS}:{name}", args=case.args, **settings)
    assert type(caught.value) is case.kind
    message = str(caught.value)
    assert [part for part in case.says if part not in message] == []
    assert is_whole(caught.value)
    assert (tmp_path / "runs").exists() == case.starts


def is_whole(error: LockstepError) -> bool:
    """Whether an error says what was expected and what to do; a traceback speaks for itself."""
    return "Traceback" in error.what or bool(error.expected and error.fix)


def test_memory_is_counted_before_any_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def create(name: str, nbytes: int) -> None:
        raise AssertionError(f"{nbytes} bytes were asked for")

    monkeypatch.setattr("lockstep.system.shared_memory.Segment.create", create)
    monkeypatch.setattr("lockstep.system.machine.available_bytes", lambda: 1000)
    task = Blobs()
    with pytest.raises(errors.ResourceError, match="the run's shared memory"):
        building.build(task, task.model(), shards=2, max_workers=2, clip=False)


# A loss that is not finite.


def test_a_loss_that_is_not_finite(run_folders: Callable[[], str]) -> None:
    """Its step is named, and the state before it is kept as if the run had stopped there.

    That the other worker has not digested its share of the step before makes no difference.
    """
    step = first_step_with(Poisoned.sample)
    assert 0 < step < SETTINGS["steps"] - 1
    late = Fault(worker_id=0, step=step - 1, phase="audit", kind="stop")
    task = f"{TASKS}:Poisoned"
    folder, clean_folder = Path(run_folders()), run_folders()
    with pytest.raises(errors.NonFiniteError, match=f"at step {step}, shard 1:") as caught:
        lockstep.run(
            task, **SETTINGS, faults=(late,), stall_seconds=60.0, quiet=True, out=str(folder)
        )
    assert is_whole(caught.value)

    clean = lockstep.run(
        task, **{**SETTINGS, "steps": step, "workers": 1}, quiet=True, out=clean_folder
    )
    (path,) = list_checkpoints(folder / "checkpoints")
    checkpoint = open_checkpoint(path)
    assert checkpoint.step == step
    assert checkpoint.manifest["fingerprint"] == clean.fingerprint
    weights = path / "model.safetensors"
    assert weights.read_bytes() == (clean.folder / "model.safetensors").read_bytes()
    Blobs().model().load_state_dict(load_file(weights))
    recorded = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    assert [line["step"] for line in recorded if "step" in line] == list(range(step))


def first_step_with(sample: int) -> int:
    """The step of the first data epoch whose batch has this sample."""
    generator = torch.Generator().manual_seed(derive(0, "order", 0))
    return torch.randperm(SAMPLES, generator=generator).tolist().index(sample) // BATCH


# What is refused before anything is started.


def test_more_workers_than_shards() -> None:
    with pytest.raises(errors.JobError, match="more workers than shards") as caught:
        lockstep.run(Blobs(), workers=3, shards=2)
    assert "shards >= workers = 3" in caught.value.expected
    assert is_whole(caught.value)


class _BytesPath:
    def __fspath__(self) -> bytes:
        return b"run"


def test_a_path_for_a_run_folder(tmp_path: Path) -> None:
    result = lockstep.run(
        Blobs(), steps=1, workers=1, batch_size=8, evaluate=False, quiet=True, out=tmp_path / "run"
    )
    assert result.folder == tmp_path / "run"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["job"]["out"] == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("workers", "two", "workers has the wrong type"),
        ("workers", True, "workers has the wrong type"),
        ("batch_size", 0, "batch_size is out of range"),
        ("seed", 0.5, "seed has the wrong type"),
        ("clip_grad_norm", -1, "clip_grad_norm is out of range"),
        ("precision", "fp64", "precision is not one of its values"),
        ("data_epochs", -1, "data_epochs is out of range"),
        ("wokers", 2, "unknown setting: .*wokers"),
        ("data_epochs", math.nan, "data_epochs is out of range"),
        ("data_epochs", math.inf, "data_epochs is out of range"),
        ("audit", 1.5, "audit is out of range"),
        ("out", 3, "out has the wrong type"),
        ("out", _BytesPath(), "out has the wrong type"),
        ("evaluate", "no", "evaluate has the wrong type"),
        ("seed", 2**63, "seed is out of range"),
        ("threads", 10**9, "threads is out of range"),
    ],
)
def test_wrong_settings(setting: str, value: object, says: str) -> None:
    with pytest.raises(errors.JobError, match=says):
        Job(task=Blobs()).replace(**{setting: value})


class Unpicklable(Blobs):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_a_task_that_cannot_be_pickled_is_refused(run_folder: str) -> None:
    with pytest.raises(errors.TaskError, match="cannot be handed to another process") as caught:
        lockstep.run(Unpicklable(), workers=1, steps=0, quiet=True, out=run_folder)
    assert caught.value.found == "self.lock"
    assert is_whole(caught.value)


@pytest.mark.parametrize("value", [torch.zeros(2), {1: 2}, {"a", "b"}, b"lr"])
def test_arguments_that_are_not_json_are_refused(value: object) -> None:
    with pytest.raises(errors.JobError, match="'lr' cannot be written to the manifest") as caught:
        source_of(Job(task="mnist", args={"lr": value}))
    assert is_whole(caught.value)


def test_arguments_that_are_json_are_taken() -> None:
    args = {"lr": 0.1, "sizes": (1, [2, (3,)]), "wide": None, "limit": math.inf, "by": {"a": True}}
    assert source_of(Job(task="mnist", args=args)).args == args


def test_a_folder_that_cannot_be_made_is_named() -> None:
    with pytest.raises(errors.RunFolderError, match="run folder /proc/none cannot be made") as e:
        RunFolder.create("/proc/none", "label")
    assert is_whole(e.value)


def test_metrics_that_are_not_finite_are_null_in_json(run_folder: str) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    task = f"{TASKS}:MetricsThatAreNotFinite"
    result = lockstep.run(task, workers=1, steps=1, quiet=True, out=run_folder)
    assert math.isnan(result.metrics["nan"])
    for line in (Path(run_folder) / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    text = (Path(run_folder) / "result.json").read_text()
    assert json.loads(text, parse_constant=refuse)["metrics"]["inf"] is None
    assert math.isnan(lockstep.Result.open(run_folder).metrics["nan"])


def test_arguments_for_an_object_are_refused(run_folder: str) -> None:
    with pytest.raises(errors.JobError, match="args"):
        lockstep.run(Blobs(), args={"lr": 1}, workers=1, steps=0, quiet=True, out=run_folder)


def test_a_run_of_no_steps_has_a_result_that_is_json(run_folder: str) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lockstep.run(f"{TASKS}:Blobs", workers=1, steps=0, quiet=True, out=run_folder)
    result = (Path(run_folder) / "result.json").read_text()
    assert json.loads(result, parse_constant=refuse)["steps"] == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("task: mnist\n\nwokers: 2\n", "job.yaml, line 3: unknown key 'wokers'"),
        ("task: mnist\nworkers: two\n", "job.yaml, line 2: workers has the wrong type"),
        ("workers: 2\ntask: [mnist]\n", "job.yaml, line 2: task is not a name"),
        ("task: mnist\nargs: cnn\n", "job.yaml, line 2: args is not a mapping"),
        ("task: mnist\nseed: -1\n", "job.yaml, line 2: seed is out of range"),
        ("task: mnist\nworkers: 3\nshards: 2\n", "more workers than shards"),
        ("workers: 2\n", "job.yaml names no task"),
        ("task: mnist\nseed: 1\nseed: 2\n", "job.yaml, line 3: seed is given twice.*line 2"),
        ("task: mnist\non: 2\n", "job.yaml, line 2: unknown key True"),
        ("- mnist\n", "job.yaml is not a mapping"),
        ("", "job.yaml is not a mapping"),
        ("task: mnist\nargs: {model: cnn\nseed: 1\n", "job.yaml is not YAML: .*line 3"),
        ("task: !!python/object/apply:os.getcwd []\n", "job.yaml is not YAML: .*line 1"),
        ("\0", "job.yaml is not YAML"),
        (None, "job.yaml cannot be read: .*No such file"),
    ],
)
def test_wrong_job_files(text: str | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(errors.JobError, match=f"(?s){says}"):
        read_job_file(path)


# The command: one message on stderr, nothing on stdout, and the right exit code.


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([f"{TASKS}:Blobs", "--workers=3", "--shards=2"], "more workers than shards"),
        ([f"{TASKS}:Blobs", "--out=taken"], "the run folder taken exists"),
        (["mnist", "--modle=cnn"], "does not take these arguments: got an unexpected keyword"),
        (["job.yaml"], "job.yaml, line 2: unknown key 'wokers'"),
    ],
    ids=["shards", "taken", "argument", "job-file"],
)
def test_command_refuses(arguments: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "job.yaml").write_text("task: mnist\nwokers: 2\n")
    ended = command.lockstep("run", *arguments, "--json", cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("lockstep: ")
    assert ended.stderr.count("lockstep: ") == 1
    assert says in ended.stderr
    assert "\n  next: " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["job.yaml", "taken"]


def test_a_misspelt_option_is_named(tmp_path: Path) -> None:
    ended = command.lockstep("verify", "--worker", "1", "run", cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert "--worker" in ended.stderr


def test_what_workers_raise_is_shown_once(tmp_path: Path) -> None:
    """With the user's frames and none of Lockstep's, though three workers raise at once."""
    three = ["--workers=3", "--shards=3", "--threads=1", f"--batch-size={BATCH}", "--purity=0"]
    ended = command.lockstep(
        "run", f"{TASKS}:RaisesEverywhere", *three, "--quiet", "--out=run", cwd=tmp_path
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.startswith("lockstep: the task raised an error while computing step 0\n")
    assert ended.stderr.count("Traceback (most recent call last)") == 1
    assert ended.stderr.count("KeyError: 'no such key'") == 1
    frames = [line.strip() for line in ended.stderr.splitlines() if line.startswith("  File ")]
    assert len(frames) == 2
    assert [str(TASKS) in frame for frame in frames] == [True, True]
    assert [frame.rpartition(" in ")[2] for frame in frames] == ["loss", "look_up"]


# Code that prints.


@pytest.fixture(scope="module")
def talk(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Both streams of a run whose task prints, on a machine that buffers what is printed."""
    folder = tmp_path_factory.mktemp("talk")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONUNBUFFERED", raising=False)
        ended = command.lockstep(
            "run", f"{TASKS}:Talks", *FLAGS, "--quiet", "--json", "--out=run", cwd=folder
        )
    assert ended.returncode == 0
    return ended.stdout, ended.stderr


def test_stdout_is_json_though_the_task_prints(talk: tuple[str, str]) -> None:
    stdout, stderr = talk
    assert stdout.count("\n") == 1
    assert json.loads(stdout)["steps"] == SETTINGS["steps"]
    for said in ("building the model", "from a child", "from below Python", "measuring"):
        assert said in stderr


def test_what_is_printed_once_is_shown_once(talk: tuple[str, str]) -> None:
    assert talk[1].count("building the model") == 1
