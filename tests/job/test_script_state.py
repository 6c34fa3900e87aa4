"""What a script sets in modules before it starts a run counts in the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lockstep.job.plain_values import NOT_PLAIN, decode, encode
from tests.support import command

SETTINGS = """
import argparse, dataclasses, torch
LR = 0.1
DTYPE = torch.float32
TABLE = {"depth": 1, "sizes": [1, 2]}
ALIAS = TABLE
ARGS = None
class Config:
    width = 3
@dataclasses.dataclass
class Options:
    rate: float = 0.0
OPTIONS = Options()
def activation(x):
    return x
"""
SCRIPT = """
import argparse, json, logging, sys, torch, lockstep, settings, late
from torch.utils.data import TensorDataset
{change}

class T(lockstep.Task):
    def model(self): return torch.nn.Linear(4, 2)
    def train_data(self):
        x = torch.ones(16, 4)
        return TensorDataset(x, torch.arange(16) % 2)
    def loss(self, m, b): return torch.nn.functional.cross_entropy(m(b[0]), b[1])
    def optimizer(self, p):
        imported = "late" in sys.modules
        import late
        seen = dict(
            lr=settings.LR, dtype=str(settings.DTYPE), table=settings.ALIAS,
            args=vars(settings.ARGS or argparse.Namespace()),
            width=settings.Config.width, rate=settings.OPTIONS.rate, param=str(p[0].dtype),
            late=[imported, late.VALUE], level=logging.getLogger().level,
        )
        open("seen.json", "w").write(json.dumps(seen))
        return torch.optim.SGD(p, lr=settings.LR)

for workers in (1, 2):
    settings_of_run = dict(workers=workers, shards=2, threads=1, batch_size=8, quiet=True)
    print(lockstep.run(T(), out=f"run-{{workers}}", **settings_of_run).fingerprint)
"""
CHANGE = """
settings.LR, settings.DTYPE, late.VALUE = 0.5, torch.float64, 2
settings.TABLE["sizes"].append(3); settings.Config.width = 7; settings.OPTIONS.rate = 0.25
settings.ARGS = argparse.Namespace(epochs=4)
torch.set_default_dtype(torch.float64); logging.getLogger().setLevel(logging.ERROR)
"""


def project(folder: Path, change: str) -> None:
    (folder / "settings.py").write_text(SETTINGS)
    (folder / "late.py").write_text("VALUE = 1\n")
    (folder / "script.py").write_text(SCRIPT.format(change=change))


def test_what_a_script_sets_counts(tmp_path: Path) -> None:
    project(tmp_path, CHANGE)
    ended = command.python("script.py", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    one, two = ended.stdout.split()
    assert one == two
    assert json.loads((tmp_path / "seen.json").read_text()) == {
        "lr": 0.5, "dtype": "torch.float64", "table": {"depth": 1, "sizes": [1, 2, 3]},
        "args": {"epochs": 4}, "width": 7, "rate": 0.25, "param": "torch.float64",
        "late": [False, 2], "level": 40,
    }  # fmt: skip


def test_a_function_that_was_replaced_is_refused(tmp_path: Path) -> None:
    project(tmp_path, "def other(x): return -x\nsettings.activation = other")
    ended = command.python("script.py", cwd=tmp_path)
    assert ended.returncode != 0
    assert "replaced the function settings.activation" in ended.stderr


def test_a_run_that_is_started_by_an_import_is_refused(tmp_path: Path) -> None:
    project(tmp_path, "")
    ended = command.lockstep("run", "script.py:T", cwd=tmp_path)
    assert ended.returncode != 0
    assert "imported in order to find a task" in ended.stderr + ended.stdout
    assert '__name__ == "__main__"' in ended.stderr + ended.stdout


@pytest.mark.parametrize(
    "value",
    [
        1, True, 0.1, float("nan"), None, "a", b"b", 2j, (1, (2, 3)), [1, {"a": [None]}], {1, 2},
        frozenset({"a"}), Path("a") / "b", {}, [], torch.float64, torch.device("cpu"),
    ],
    ids=repr,
)  # fmt: skip
def test_plain_values(value: object) -> None:
    encoded = encode(value)
    assert encode(decode(encoded)) == encoded
    assert type(decode(encoded)) is type(value)


def test_equal_numbers_of_other_types_differ() -> None:
    assert encode(1) != encode(True)
    assert encode(0.0) != encode(-0.0)
    assert encode([1]) != encode((1,))
    assert encode(float("nan")) == encode(-float("nan"))


def test_what_is_not_plain() -> None:
    loop: list[object] = []
    loop.append(loop)
    for value in (object(), [object()], {"a": lambda: 0}, loop, list(range(20_000)), open):
        assert encode(value) is NOT_PLAIN
