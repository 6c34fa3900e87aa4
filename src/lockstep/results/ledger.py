"""Ledger: one line per committed step, each chained to the one before by its hash.

    {"ledger":1,"job":...,"state":...,"hash":...}                    the job and its initial state
    {"step":0,"data_epoch":0,"samples":256,"loss":"0x1.2p+1","units":{...},"hash":...}
    {"evaluated":938,"metrics":{"loss":"0x1.1p-2"},"hash":...}       where metrics decide something
    {"end":938,"state":...,"hash":...}                               the final fingerprint

A line's hash is BLAKE3 over the hash before it and the line without its own. The file is the same,
byte for byte, for any number of workers and any history of failures.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from lockstep.errors import IntegrityError, disk_errors
from lockstep.planning.metric_decisions import Evaluation

FIRST = "0" * 32


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """Step record: a committed step as the ledger records it."""

    step: int
    data_epoch: int
    samples: int
    loss: float
    units: Mapping[str, str]
    """Digest sample: digests of a rolling part of the state after the step
    (`lockstep.planning.digest_sample`)."""
    norm: float | None = None
    logged: Mapping[str, float] = field(default_factory=dict)
    """What the task logs beside the loss: means over the step's samples."""
    lr: float | None = None
    """The learning rate of the optimizer's first group: for the events alone."""

    def body(self) -> str:
        """The line without its hash, in canonical form."""
        units = ",".join(f'{json.dumps(name)}:"{digest}"' for name, digest in self.units.items())
        norm = "" if self.norm is None else f',"norm":"{self.norm.hex()}"'
        return (
            f'{{"step":{self.step},"data_epoch":{self.data_epoch},"samples":{self.samples},'
            f'"loss":"{self.loss.hex()}"{norm}{_numbers("logged", self.logged)},'
            f'"units":{{{units}}}'
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """Evaluation record: held-out metrics that decide something, as the ledger records them."""

    step: int
    metrics: Mapping[str, float]

    def body(self) -> str:
        """The line without its hash, in canonical form."""
        return f'{{"evaluated":{self.step}{_numbers("metrics", self.metrics)}'


def _numbers(key: str, values: Mapping[str, float]) -> str:
    """A field of a line for these values, with all their bits; none: no field."""
    listed = ",".join(f'{json.dumps(name)}:"{value.hex()}"' for name, value in values.items())
    return f',"{key}":{{{listed}}}' if listed else ""


def chain(previous: str, body: str) -> str:
    """The hash of a line without its own, after the line with the previous hash."""
    return blake3(f"{previous}{body}".encode()).hexdigest(16)


class Ledger:
    """Ledger: appends lines to a file. `flush` hands them to the kernel, `sync` to the disk."""

    def __init__(self, path: Path, last_hash: str = FIRST) -> None:
        self.hash = last_hash
        with disk_errors("the ledger"):
            self._file = path.open("a", encoding="utf-8")

    def begin(self, job_digest: str, state: str) -> None:
        """Write the first line."""
        self._append(f'{{"ledger":1,"job":"{job_digest}","state":"{state}"')

    def commit(self, record: StepRecord) -> None:
        """Write a step's line."""
        self._append(record.body())

    def evaluated(self, record: EvaluationRecord) -> None:
        """Write an evaluation's line."""
        self._append(record.body())

    def end(self, steps: int, state: str) -> None:
        """Write the last line."""
        self._append(f'{{"end":{steps},"state":"{state}"')
        self.flush()
        self.sync()

    def _append(self, body: str) -> None:
        self.hash = chain(self.hash, body)
        with disk_errors("the ledger"):
            self._file.write(f'{body},"hash":"{self.hash}"}}\n')

    def flush(self) -> None:
        """Hand every line to the kernel, so that a killed coordinator loses none of them.

        Raises:
            ResourceError: the disk is full.
        """
        with disk_errors("the ledger"):
            self._file.flush()

    def sync(self) -> None:
        """Write every flushed line to the disk. May be called from any thread."""
        with disk_errors("the ledger"):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line that has been read, and whose hash is correct."""

    content: dict[str, Any]
    body: str
    end: int
    """The byte offset of the line's end in the file."""

    @property
    def hash(self) -> str:
        value: str = self.content["hash"]
        return value

    @property
    def after(self) -> int:
        """After how many committed steps the line was written."""
        content = self.content
        if "step" in content:
            return int(content["step"]) + 1
        return int(content.get("evaluated", content.get("end", 0)))

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation that the line records, if it does."""
        if "evaluated" not in self.content:
            return None
        texts = self.content.get("metrics", {})
        metrics = {name: float.fromhex(text) for name, text in texts.items()}
        return Evaluation(step=self.content["evaluated"], metrics=metrics)


def read_ledger(path: Path, *, torn_tail: bool = False) -> Iterator[Line]:
    """Read and check a ledger, line by line.

    With `torn_tail` an incomplete last line, as a crash leaves it, is ignored.

    Raises:
        IntegrityError: a line's hash is wrong; the line is named.
    """
    previous, end = FIRST, 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            body, separator, tail = raw.decode(errors="replace").rpartition(',"hash":"')
            expected = chain(previous, body)
            if not separator or tail != f'{expected}"}}\n':
                if torn_tail and not raw.endswith(b"\n"):
                    return
                raise IntegrityError(
                    f"{path}: line {number} is not what was recorded{_name_step(body)}",
                    expected=f"hash {expected}",
                    found=f"hash {tail.rstrip()[:32] or 'none'}",
                    fix="the ledger was altered here or just before; use a copy of it",
                )
            end += len(raw)
            yield Line(content=json.loads(raw), body=body, end=end)
            previous = expected


def evaluations_of(lines: Iterable[Line]) -> tuple[Evaluation, ...]:
    """The evaluations that lines of a ledger record."""
    return tuple(found for line in lines if (found := line.evaluation) is not None)


def numbers_of(line: Line) -> dict[str, float]:
    """The numbers of a step's line: loss, norm, and what the task has logged beside the loss."""
    content = line.content
    numbers = {name: content[name] for name in ("loss", "norm") if name in content}
    numbers |= content.get("logged", {})
    return {name: float.fromhex(text) for name, text in numbers.items()}


def _name_step(body: str) -> str:
    try:
        return f" (step {json.loads(body + '}')['step']})"
    except (ValueError, KeyError, TypeError):
        return ""
