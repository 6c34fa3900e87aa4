"""The notebook display: one output of a cell, replaced while a run goes on."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from lockstep.results.notebook_display import LAST_LINES, NotebookDisplay, in_notebook
from lockstep.results.progress import Progress
from tests.support import command

CELL = """
import torch, lockstep
from torch.utils.data import TensorDataset

class Sums(lockstep.Task):
    def model(self):
        return torch.nn.Linear(8, 1)
    def train_data(self):
        x = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))
        return TensorDataset(x, x.sum(1, keepdim=True))
    def eval_data(self):
        return self.train_data()
    def loss(self, model, batch):
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1])
    def optimizer(self, params):
        return torch.optim.SGD(params, lr=0.01)

result = lockstep.run(Sums(), workers=2, data_epochs=3)
print(result.fingerprint)
"""


class Notebook:
    """Stands for IPython, in a kernel."""

    def __init__(self, *, fails: bool = False) -> None:
        self.shown: list[str] = []
        self.updated: list[str] = []
        self.fails = fails
        self.display = types.SimpleNamespace(HTML=str, display=self._display)

    def get_ipython(self) -> Any:
        return types.SimpleNamespace(kernel=object())

    def _display(self, content: str, *, display_id: bool) -> Any:
        assert display_id
        if self.fails:
            raise RuntimeError("the front end is gone")
        self.shown.append(content)
        return types.SimpleNamespace(update=self.updated.append)


def test_an_output_is_made_once_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook()
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    now = [0.0]
    with Progress(True, 100, "<b>mnist</b>", clock=lambda: now[0]) as progress:
        for step in range(1, 101):
            progress.update(step, 1.0 / step, 5000.0, 2, 0)
            now[0] += 0.05
        for step in range(20):
            progress.evaluated(step, {"accuracy": 0.9})
        progress.note("worker 1 <script>alert(1)</script>")
    assert len(notebook.shown) == 1
    assert 20 < len(notebook.updated) < 60  # not a hundred: it is redrawn four times a second
    last = notebook.updated[-1]
    assert "100/100" in last
    assert "<polyline" in last
    assert last.count("<li>") == LAST_LINES
    assert "<script>" not in last
    assert "<b>mnist" not in last


def test_what_goes_wrong_there_is_not_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", Notebook(fails=True))
    with Progress(True, 10, "a") as progress:
        progress.update(3, float("nan"), 1.0, 1)


def test_nothing_is_imported_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook()
    assert "IPython" not in sys.modules
    NotebookDisplay("a", 3).show(1, 0.5, ["1/3"])  # draws nothing, and raises nothing


EXECUTE = """
import json, sys, nbclient
from nbformat.v4 import new_code_cell, new_notebook
notebook = new_notebook(cells=[new_code_cell(cell) for cell in json.load(sys.stdin)])
nbclient.NotebookClient(notebook, timeout=100, kernel_name="python3").execute()
print(json.dumps([cell.outputs for cell in notebook.cells]))
"""


@pytest.mark.long
def test_in_a_kernel(tmp_path: Path) -> None:
    """A cell that trains has one display, with the last state, and no lines of progress; so has one
    that starts a run in the background."""
    for name in ("nbclient", "ipykernel"):
        pytest.importorskip(name, reason="needs nbclient and ipykernel")
    cells = [
        CELL,
        "result",
        "lockstep.start(Sums(), workers=1, data_epochs=1).result().fingerprint",
    ]
    ended = command.python("-c", EXECUTE, cwd=tmp_path, script=json.dumps(cells))
    assert ended.returncode == 0, ended.stderr
    training, result, background = json.loads(ended.stdout.splitlines()[-1])
    (shown,) = [each for each in training if each["output_type"] == "display_data"]
    text = shown["data"]["text/html"]
    assert "192/192" in text
    assert "<polyline" in text
    assert "evaluated at step 192" in text
    printed = "".join(each["text"] for each in training if each["output_type"] == "stream")
    (fingerprint,) = re.findall(r"^[0-9a-f]{64}$", printed, re.M)
    assert "samples/s" not in printed
    assert fingerprint in result[0]["data"]["text/html"]
    (shown,) = [each for each in background if each["output_type"] == "display_data"]
    assert "64/64" in shown["data"]["text/html"]
