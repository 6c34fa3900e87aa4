"""The script that checks a GPU, itself checked where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support import command
from tests.support.file_tree import ROOT


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    ended = command.python("-m", "benchmarks.device_check", cwd=ROOT)
    assert ended.returncode == 1
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("device-check: no GPU that torch can use here: ")


@pytest.mark.long
def test_it_finds_one_fingerprint_of_each_model(tmp_path: Path) -> None:
    out = tmp_path / "device.json"
    arguments = (
        "--device",
        "cpu-apart",
        "--models",
        "mlp",
        "cnn",
        "--steps",
        "6",
        "--out",
        str(out),
    )
    ended = command.python("-m", "benchmarks.device_check", *arguments, cwd=ROOT)
    found = json.loads(out.read_text())
    assert json.loads(ended.stdout) == found
    assert ended.returncode == 0, ended.stderr
    assert found["kept"]
    for prints in found["fingerprints"].values():
        assert list(prints) == ["1 workers", "2 workers", "3 workers", "again"]
        assert len(set(prints.values())) == 1
    assert len(found["deaths"]) == 3
    assert all(death["deaths"] == 1 for death in found["deaths"].values())
    assert set(found["samples_per_second"]) == {"lockstep", "plain", "ddp"}
    assert found["short_of_memory"] == "not tried"


def test_what_there_is_no_time_for_is_left_out_and_counts(tmp_path: Path) -> None:
    out = tmp_path / "device.json"
    arguments = ("--device", "cpu-apart", "--models", "mlp", "--seconds", "0", "--out", str(out))
    ended = command.python("-m", "benchmarks.device_check", *arguments, cwd=ROOT)
    assert ended.returncode == 2
    assert not json.loads(out.read_text())["kept"]
