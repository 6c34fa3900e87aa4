"""Signals that stop a run of a script: no `except Exception` goes on with the next one."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from lockstep.coordinator.run_control import RunControl
from lockstep.errors import RunInterrupted, StoppedError
from tests.support import command

SWEEP = """
import os, signal, sys, threading, time, torch, lockstep
from functools import partial
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

x = torch.randn(64, 4)
data = TensorDataset(x, (x[:, 0] > 0).long())

def slow(model_out, wanted):
    time.sleep(0.05)
    return cross_entropy(model_out, wanted)

def press():
    while not os.path.exists("run-0/ledger.jsonl"):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGNAL)

threading.Thread(target=press).start()
for number in range(2):
    task = lockstep.from_module(
        partial(torch.nn.Linear, 4, 2), data, slow, partial(torch.optim.SGD, lr=0.1)
    )
    try:
        lockstep.run(task, workers=1, shards=1, threads=1, batch_size=8, steps=2000, quiet=True,
                     out=f"run-{number}")
    except Exception as error:
        print("on to the next:", error)
"""


@pytest.mark.parametrize("name", ["SIGINT", pytest.param("SIGTERM", marks=pytest.mark.long)])
def test_ctrl_c_ends_a_sweep(name: str, tmp_path: Path) -> None:
    ended = command.python("-", cwd=tmp_path, script=SWEEP.replace("SIGNAL", name))
    assert "on to the next" not in ended.stdout
    assert "stopped after step" in ended.stderr
    assert "lockstep resume run-0" in ended.stderr
    assert ended.returncode != 0
    assert not (tmp_path / "run-1").exists()
    assert len(list((tmp_path / "run-0/checkpoints").iterdir())) == 1


def test_a_request_is_an_error_and_a_signal_an_interruption() -> None:
    error = StoppedError("stopped after step 3, as asked", fix="lockstep resume run")
    with RunControl() as control:
        control.add("stop")
        assert control.stopped(error) is error
        control.take_signals()
        signal.raise_signal(signal.SIGINT)
        stopped = control.stopped(error)
    assert isinstance(stopped, RunInterrupted)
    assert not isinstance(stopped, Exception)
    assert (str(stopped), stopped.stopped) == (str(error), error)
