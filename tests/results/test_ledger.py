"""The ledger: what it says is read back, and what was altered is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lockstep.errors import IntegrityError
from lockstep.results.ledger import Ledger, StepRecord, read_ledger


def write_ledger(path: Path, steps: int = 3) -> list[bytes]:
    ledger = Ledger(path)
    ledger.begin("job", "state")
    for step in range(steps):
        units = {"layer.weight": f"{step:032x}", "norm/é": "ff" * 16}
        norm = 0.5 if step == 1 else None
        record = StepRecord(
            step=step, data_epoch=0, samples=26, loss=1 / (step + 3), units=units, norm=norm
        )
        ledger.commit(record)
    ledger.end(steps, "final")
    ledger.close()
    return path.read_bytes().splitlines(keepends=True)


def test_ledger_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = write_ledger(path)
    found = list(read_ledger(path))
    assert [json.loads(line) for line in lines] == [line.content for line in found]
    assert [line.end for line in found] == list(np.cumsum([len(line) for line in lines]))
    assert float.fromhex(found[1].content["loss"]) == 1 / 3
    assert found[-1].content["end"] == 3


@pytest.mark.parametrize("mask", [1, 0x20, 0x80, 0xFF])
def test_ledger_names_the_line_with_an_altered_byte(tmp_path: Path, mask: int) -> None:
    """Every byte of every line; 0x20 makes other letters, 0x80 makes bytes that are not UTF-8."""
    path = tmp_path / "ledger.jsonl"
    lines = write_ledger(path)
    whole = b"".join(lines)
    places = [number for number, line in enumerate(lines, start=1) for _ in line]
    for at, number in enumerate(places):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
        with pytest.raises(IntegrityError, match=rf"line {number}\b"):
            list(read_ledger(path))


def test_ledger_names_the_line_that_was_moved(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    a, b, c, d, e = write_ledger(path)
    altered = {3: [a, b, d, c, e], 2: [a, c, d, e], 4: [a, b, c, c, d, e], 1: [b, c, d, e]}
    for number, lines in altered.items():
        path.write_bytes(b"".join(lines))
        with pytest.raises(IntegrityError, match=rf"line {number}\b"):
            list(read_ledger(path))


def test_ledger_names_the_step(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = write_ledger(path)
    lines[2] = lines[2].replace(b"26", b"62")
    path.write_bytes(b"".join(lines))
    with pytest.raises(IntegrityError, match=r"line 3 .*\(step 1\)"):
        list(read_ledger(path))


def test_torn_ledger(tmp_path: Path) -> None:
    """Cut at every byte: what is whole before the cut is read, or the torn line is named."""
    path = tmp_path / "ledger.jsonl"
    lines = write_ledger(path)
    whole = b"".join(lines)
    ends = [int(end) for end in np.cumsum([len(line) for line in lines])]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        intact = sum(end <= cut for end in ends)
        assert len(list(read_ledger(path, torn_tail=True))) == intact
        if cut not in (0, *ends):
            with pytest.raises(IntegrityError, match=rf"line {intact + 1}\b"):
                list(read_ledger(path))


def test_torn_tail_does_not_excuse_an_altered_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = write_ledger(path)
    path.write_bytes(b"".join(lines[:2]) + lines[2].replace(b"26", b"62") + lines[3][:20])
    with pytest.raises(IntegrityError, match="line 3"):
        list(read_ledger(path, torn_tail=True))


def test_ledger_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    lines = write_ledger(first)
    second.write_bytes(b"".join(lines[:2]))
    ledger = Ledger(second, list(read_ledger(second))[-1].hash)
    for line in read_ledger(first):
        if line.content.get("step", 0) >= 1 or "end" in line.content:
            ledger._append(line.body)
    ledger.close()
    assert second.read_bytes() == first.read_bytes()
