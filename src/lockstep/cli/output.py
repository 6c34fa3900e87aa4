"""Output: results on stdout, notes on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lockstep.errors import ResourceError

if TYPE_CHECKING:
    from lockstep.results.result import Result


def show_result(result: Result, as_json: bool) -> None:
    """Print a result. The run has it whatever happens to stdout.

    Raises:
        ResourceError: stdout cannot be written to.
    """
    try:
        _print_result(result, as_json)
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # or Python tries to write the rest when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ResourceError(
            f"the result cannot be printed: {error}", fix=f"it is in {result.folder}/result.json"
        ) from error


def _print_result(result: Result, as_json: bool) -> None:
    from lockstep.planning.core_split import Division
    from lockstep.results.manifest import scope_of
    from lockstep.results.recoveries import summarise_recoveries
    from lockstep.results.run_folder import RunFolder

    if as_json:
        print(json.dumps(result.to_message()))
        return
    print(f"fingerprint  {result.fingerprint}")
    manifest = RunFolder.open(result.folder).read_manifest()
    print(f"holds for    {scope_of(manifest)}")
    show_metrics(result.metrics, result.baseline)
    if result.best is not None:
        best = result.best
        print(f"best         {best['metric']} {best['value']:.6g}, {best['checkpoint']}")
    if result.stopped_early:
        print(f"stopped      early: {result.stopped_early}")
    split = Division(
        workers=result.workers, threads=result.threads, shards=result.shards,
        team=manifest["plan"].get("team", 1),
    )  # fmt: skip
    print(f"plan         {split}")
    recovered = summarise_recoveries(result.recoveries)
    if recovered:
        print(f"recoveries   {recovered}")
    print(f"speed        {result.samples_per_second:,.0f} samples/s, {result.steps} steps")
    print(f"time         {result.wall_seconds:.1f} s, {result.startup_seconds:.1f} s to start")
    print(f"folder       {result.folder}")


def show_metrics(metrics: Mapping[str, float], baseline: Mapping[str, float]) -> None:
    """Print metrics, each with that of a trivial predictor where there is one."""
    for name, value in metrics.items():
        beside = f"  (baseline {baseline[name]:.6g})" if name in baseline else ""
        print(f"{name:<12} {value:.6g}{beside}")


def show_notes(notes: Iterable[str]) -> None:
    """Print what is worth knowing about a result, on stderr."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def show_cuts(cuts: Sequence[Mapping[str, Any]]) -> None:
    """Print what becomes of each module with matrices, as a table."""
    rows = [("module", "cut", "pieces", "reason")]
    for cut in cuts:
        pieces = " ".join(map(str, cut["pieces"]))
        rows.append((cut["module"] or "(model)", cut["cut"] or "-", pieces, cut["reason"]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    print("\nmatrices")
    for row in rows:
        columns = "  ".join(f"{row[at]:<{width}}" for at, width in enumerate(widths))
        print(f"  {columns}  {row[3]}".rstrip())
