"""Limits of the system that a run meets: it goes on, or says which one it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TASK = """
import torch, lockstep
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

class D(Dataset):
    def __len__(self): return 400
    def __getitem__(self, i): return torch.ones(8) * i, i % 3

class T(lockstep.Task):
    def model(self): return torch.nn.Linear(8, 3)
    def train_data(self): return D()
    def loss(self, m, b): return cross_entropy(m(b[0]) / 1000, b[1])
    def optimizer(self, p): return torch.optim.SGD(p, lr=0.1)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a task's file."""
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path


def run(folder: Path, before: str, *options: str, to: str = "/dev/null") -> tuple[int, str]:
    """Run the task from a shell that has set something; the exit code and what was said."""
    command = [sys.executable, "-m", "lockstep", "run", "task.py:T", "--out", "run", "-w", "2"]
    command += ["--steps", "30", "--batch-size", "24", "-q", *options]
    done = subprocess.run(
        ["bash", "-c", f'{before} "$@" > {to}', "bash", *command],
        cwd=folder, stderr=subprocess.PIPE, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


def test_the_limit_of_a_file_is_named(folder: Path) -> None:
    code, said = run(folder, "ulimit -f 1;")
    assert code != 0
    assert "ulimit -f" in said
    assert "Traceback" not in said


def test_a_result_that_cannot_be_printed_is_there(folder: Path) -> None:
    code, said = run(folder, "", "--json", to="/dev/full")
    assert code != 0
    assert "the result cannot be printed: [Errno 28]" in said
    assert "run/result.json" in said
    assert "Traceback" not in said
    assert json.loads((folder / "run" / "result.json").read_text())["steps"] == 30
