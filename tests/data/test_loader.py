"""Loader processes: they die, cannot hand over a batch, or share open files; no bit changes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing.synchronize import SemLock
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import lockstep
from lockstep.data.loader import follow_worker
from lockstep.data.loader_ipc import NAME
from lockstep.errors import TaskError
from lockstep.planning.worker_messages import WorkerFailed, to_agent, to_worker
from lockstep.system.processes import own_file_positions
from lockstep.system.unix_channel import Channel
from lockstep.worker.main import work
from tests.zoo.samples import Noisy
from tests.zoo.vectors import SAMPLES, Vectors

SETTINGS: dict[str, Any] = {
    "workers": 2, "shards": 2, "threads": 1, "batch_size": 26, "steps": 6, "evaluate": False,
    "quiet": True,
}  # fmt: skip


class DeadlyOnce(Noisy):
    """Kills the first loader process that asks for a certain sample."""

    def __init__(self) -> None:
        super().__init__(SAMPLES, seed=1)
        self.struck = multiprocessing.get_context("fork").Value("i", 0)

    def __getitem__(self, index: int) -> Any:
        if index == 77 and get_worker_info() is not None and self.struck.value == 0:
            self.struck.value = 1
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


class KillsALoader(Vectors):
    def train_data(self) -> Dataset[Any]:
        return DeadlyOnce()


class KillsALoaderAtItsStart(Vectors):
    """Its first loader process dies while its `DataLoader` is still being made."""

    def train_data(self) -> Dataset[Any]:
        struck = multiprocessing.get_context("fork").Value("i", 0)
        reset = _MultiProcessingDataLoaderIter._reset

        def kill(self: Any, *args: Any, **options: Any) -> None:
            if struck.value == 0:
                struck.value = 1
                pid = self._workers[0].pid
                os.kill(pid, signal.SIGKILL)
                # Not reaped: torch's handler of the signal looks, and raises an error in here.
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            reset(self, *args, **options)

        _MultiProcessingDataLoaderIter._reset = kill  # type: ignore[method-assign]
        return Noisy(SAMPLES, seed=1)


class Unpicklable(Vectors):
    def train_data(self) -> Dataset[Any]:
        return Noisy(SAMPLES, seed=1)

    def collate(self, samples: list[Any]) -> Any:
        return [*super().collate(samples), lambda: None]


class Traced(Vectors):
    """Its loss sees in which files batches lie that come from a loader process. Where it is, nobody
    can make one of Python's locks between processes, which have a name for a moment."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def train_data(self) -> Dataset[Any]:
        SemLock.__init__ = _refuse  # type: ignore[assignment, method-assign]
        return Noisy(SAMPLES, seed=1)

    def collate(self, samples: list[Any]) -> Any:
        if self.kind == "default":
            return super().collate(samples)
        columns = zip(*samples, strict=True)
        batch = [torch.stack([torch.as_tensor(value) for value in column]) for column in columns]
        if self.kind == "shared":
            batch[0] = batch[0].zero_()[:]  # what is written into one view shows in the other
            return [*batch, batch[0][:, 1:]]
        return batch

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        if model.training:
            files = [file_of(tensor) for tensor in batch]
            if not all(f"/memfd:{NAME}" in file for file in files):
                raise ValueError(f"batches lie in {files}")
            if self.kind == "shared":
                *batch, view = batch
                view.add_(1.0)
                if not batch[0][:, 1:].all():
                    raise ValueError("a view has become a copy")
        return super().loss(model, batch)


def _refuse(*_: object) -> None:
    raise AssertionError("a lock with a name is made")


def file_of(tensor: torch.Tensor) -> str:
    """The file in which a tensor lies, as the kernel names it."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, *_, name = line.split(maxsplit=5)
        first, last = (int(edge, 16) for edge in place.split("-"))
        if first <= tensor.data_ptr() < last:
            return name
    return ""


@pytest.mark.parametrize("kind", ["default", "stacked", "shared"])
def test_batches_have_no_name_on_their_way(kind: str, tmp_path: Path) -> None:
    """A loader that is killed at any moment leaves no file in /dev/shm."""
    task, args = f"{__file__}:Traced", {"kind": kind}
    found = lockstep.run(task, args=args, loaders=1, out=str(tmp_path / "1"), **SETTINGS)
    assert found.steps == SETTINGS["steps"]


@pytest.mark.parametrize("kind", ["KillsALoader", "KillsALoaderAtItsStart"])
def test_a_loader_that_is_killed_takes_its_worker_with_it(kind: str, tmp_path: Path) -> None:
    """The step is finished by the others, and the replacement has a loader of its own."""
    task = f"{__file__}:{kind}"
    calm = lockstep.run(task, loaders=0, out=str(tmp_path / "calm"), **SETTINGS)
    struck = lockstep.run(task, loaders=1, out=str(tmp_path / "struck"), **SETTINGS)
    assert [r["how"] for r in struck.recoveries] == ["lost a loader process"]
    assert struck.fingerprint == calm.fingerprint


class Struck(Channel):
    """As a loader's death is told by torch: by a signal, here just when something is said."""

    def send(self, body: bytes, fds: Sequence[int] = ()) -> None:
        os.kill(os.getpid(), signal.SIGCHLD)
        super().send(body, fds)


def test_a_second_death_does_not_cut_off_the_word_of_the_first() -> None:
    """Else the worker's death would count against its shard, and three of them end the run."""

    def torch_handler(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    ours, theirs = Channel.pair()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            signal.signal(signal.SIGCHLD, torch_handler)
            code = work(None, 0, to_agent(Struck(theirs.sock)))  # type: ignore[arg-type]  # an error at once
        finally:
            os._exit(code)
    theirs.close()
    with contextlib.closing(ours):
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
        message, _ = to_worker(ours).receive(0.0)
        assert isinstance(message, WorkerFailed)


def test_a_loader_whose_worker_has_died_already_ends() -> None:
    pid = os.fork()
    if pid == 0:
        follow_worker(os.getpid())  # not its parent, as after the parent's death
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1


def test_batches_that_a_loader_cannot_hand_over(run_folder: str) -> None:
    """Torch's own loader would wait for them for ever."""
    with pytest.raises(TaskError, match="cannot be handed over by a loader process") as error:
        lockstep.run(f"{__file__}:Unpicklable", loaders=1, out=run_folder, **SETTINGS)
    assert "set loaders to 0" in error.value.fix


def test_a_fork_reads_open_files_from_a_place_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(b"0123456789")
    with path.open("rb", buffering=0) as file:
        assert file.read(2) == b"01"
        pid = os.fork()
        if pid == 0:
            own_file_positions()
            os._exit(0 if file.read(3) == b"234" else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert file.read(3) == b"234"
