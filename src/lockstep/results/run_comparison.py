"""Run comparison: two runs side by side: settings that differ, and where their ledgers part."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lockstep.results.charts import hex_float, mapping
from lockstep.results.run_summary import shown
from lockstep.system.json_files import open_regular

CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Parting:
    """Parting: how far the ledgers of two runs are equal."""

    equal: int
    """So many steps from the first on are equal in both: losses, norms and digests of the state."""
    step: int | None
    """The first step that differs; None: none does, as far as both go."""
    what: str
    """In what, in words."""


def differing_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[list[str]]:
    """`[name, value of a, value of b]` of what differs in two manifests: the task and its
    arguments, settings, what was planned, and the machine."""
    rows: list[list[str]] = []
    told: set[str] = set()
    for title, part in _PARTS.items():
        left, right = part(a), part(b)
        for name in dict.fromkeys([*left, *right]):
            if left.get(name) != right.get(name) and name not in told:
                told.add(name)  # what the plan makes of a setting that differs, differs
                values = [shown(side[name]) if name in side else "–" for side in (left, right)]
                rows.append([f"{title}{name}", *values])
    return rows


def _task(manifest: Mapping[str, Any]) -> dict[str, Any]:
    source = mapping(manifest.get("source"))
    return {
        "task": source.get("name", ""),
        "code": manifest.get("code", ""),
        **{f"args {name}": value for name, value in mapping(source.get("args")).items()},
    }


def _planned(manifest: Mapping[str, Any]) -> dict[str, Any]:
    plan = mapping(manifest.get("plan"))
    return {name: plan[name] for name in plan if name not in ("reasons", "planned_steps")}


_PARTS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "": _task,
    "setting ": lambda manifest: dict(mapping(manifest.get("job"))),
    "plan ": _planned,
    "machine ": lambda manifest: dict(mapping(manifest.get("profile"))),
}


def find_parting(a: Path, b: Path) -> Parting:
    """Compare two ledgers step by step, without their hashes: these chain from the job, which may
    differ in what no step depends on. Lines that are equal in both from the start are passed over
    at once."""
    start = _common_lines(a, b)
    equal = 0
    pairs = itertools.zip_longest(_steps(a, start), _steps(b, start))
    for left, right in pairs:
        if left is None or right is None:
            break
        if left != right:
            return Parting(equal=_number(left), step=_number(left), what=_differing(left, right))
        equal = _number(left) + 1
    return Parting(equal=max(equal, _last_step(a, start)), step=None, what="")


def _common_lines(a: Path, b: Path) -> int:
    """How many bytes of whole lines two files have in common from the start."""
    at = whole = 0
    try:
        with open_regular(a) as left, open_regular(b) as right:
            while True:
                one, other = left.read(CHUNK), right.read(CHUNK)
                if one != other or not one:
                    same = _equal_bytes(one, other)
                    cut = one.rfind(b"\n", 0, same) + 1
                    return at + cut if cut else whole
                newline = one.rfind(b"\n") + 1
                whole = at + newline if newline else whole
                at += len(one)
    except OSError:
        return 0


def _equal_bytes(one: bytes, other: bytes) -> int:
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[:middle] == other[:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _last_step(path: Path, end: int) -> int:
    """How many steps the lines before this offset are."""
    if not end:
        return 0
    with open_regular(path) as file:
        begin = max(end - CHUNK, 0)
        file.seek(begin)
        lines = file.read(end - begin).splitlines()
    for line in reversed(lines):
        body = _body(line)
        if body.startswith(b'{"step":'):
            return _number(body) + 1
    return 0


def _steps(path: Path, start: int) -> Iterator[bytes]:
    """The lines of steps from an offset on, without their hashes."""
    try:
        with open_regular(path) as file:
            file.seek(start)
            for line in file:
                if line.startswith(b'{"step":') and line.endswith(b"}\n"):
                    yield _body(line)
    except OSError:
        return


def _body(line: bytes) -> bytes:
    return line.rpartition(b',"hash":"')[0]


def _number(body: bytes) -> int:
    try:
        return int(body[8 : body.index(b",")])
    except ValueError:
        return 0


def _differing(left: bytes, right: bytes) -> str:
    """In what two lines of a step differ, in words."""
    try:
        one, other = (mapping(json.loads(each + b"}")) for each in (left, right))
    except ValueError:
        return "lines that cannot be read"
    found = [
        f"{name} {shown(one.get(name))} and {shown(other.get(name))}"
        for name in ("step", "data_epoch", "samples")
        if one.get(name) != other.get(name)
    ]
    for name in ("loss", "norm"):
        if one.get(name) != other.get(name):
            values = [hex_float(each.get(name)) for each in (one, other)]
            found.append(f"{name} {values[0]:.9g} and {values[1]:.9g}")
    units = [mapping(each.get("units")) for each in (one, other)]
    names = [name for name in units[0] if units[0][name] != units[1].get(name)]
    if names or units[0].keys() != units[1].keys():
        listed = ", ".join((names or sorted(units[0].keys() ^ units[1].keys()))[:4])
        found.append(f"the state in {shown(listed)}")
    return "; ".join(found)
