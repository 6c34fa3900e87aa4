"""Two runs compared, and a ledger's chain followed while it grows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lockstep.results.ledger_check import LedgerCheck
from lockstep.results.run_comparison import differing_settings, find_parting
from tests.support.recorded_runs import make_run, write_ledger

LOSSES = [1 / (n + 1) for n in range(5000)]


@pytest.mark.parametrize("job", ["ab", "cd"])
@pytest.mark.parametrize("step", [0, 1, 777, 4999])
def test_the_first_step_that_differs(tmp_path: Path, job: str, step: int) -> None:
    """Also where the jobs differ, so that every hash does."""
    other = [*LOSSES[:step], 0.125, *LOSSES[step + 1 :]]
    a = write_ledger(make_run(tmp_path / "a"), LOSSES)
    b = write_ledger(make_run(tmp_path / "b"), other, job=job)
    found = find_parting(a, b)
    assert (found.step, found.equal) == (step, step)
    assert "loss" in found.what
    assert "w" in found.what


@pytest.mark.parametrize("job", ["ab", "cd"])
@pytest.mark.parametrize("length", [0, 1, 1234, 5000])
def test_one_is_the_beginning_of_the_other(tmp_path: Path, job: str, length: int) -> None:
    a = write_ledger(make_run(tmp_path / "a"), LOSSES)
    b = write_ledger(make_run(tmp_path / "b"), LOSSES[:length], job=job, end=length == 5000)
    assert find_parting(a, b).equal == find_parting(b, a).equal == length
    assert find_parting(a, b).step is None
    assert find_parting(a, tmp_path / "none.jsonl").equal == 0


def test_settings_that_differ_are_told_once(tmp_path: Path) -> None:
    manifests = [
        json.loads((make_run(tmp_path / str(n), seed=n) / "manifest.json").read_text())
        for n in (1, 2)
    ]
    manifests[1]["profile"]["capability"] = "AVX2"
    manifests[1]["source"]["args"] = {}
    assert differing_settings(*manifests) == [
        ["args model", "cnn", "–"],
        ["setting seed", "1", "2"],
        ["machine capability", "AVX512", "AVX2"],
    ]
    assert differing_settings(manifests[0], manifests[0]) == []


def test_a_chain_is_followed_while_it_grows(tmp_path: Path) -> None:
    whole = write_ledger(make_run(tmp_path / "whole"), LOSSES[:100]).read_bytes()
    path = tmp_path / "ledger.jsonl"
    check = LedgerCheck(path)
    assert not check.advance()
    for end in (10, 3000, 3001, len(whole)):
        path.write_bytes(whole[:end])
        while check.advance():
            pass
        assert check.steps == max(whole[:end].count(b"\n") - 1, 0) - (end == len(whole))
    assert check.whole
    assert check.broken is None


def test_a_line_that_was_altered_is_found(tmp_path: Path) -> None:
    path = write_ledger(make_run(tmp_path / "run"), LOSSES[:100])
    lines = path.read_bytes().splitlines(keepends=True)
    lines[40] = lines[40].replace(b'"samples":64', b'"samples":65')
    path.write_bytes(b"".join(lines))
    check = LedgerCheck(path)
    check.advance()
    assert (check.broken, check.steps) == (41, 39)
    path.write_bytes(b"".join(lines[:20]))  # a resume has cut it
    check.advance()
    assert (check.broken, check.steps) == (None, 19)
