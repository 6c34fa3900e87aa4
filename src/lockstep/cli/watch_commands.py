"""The commands that show runs: `watch` (the page), `runs`, `status` and `compare`."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lockstep.cli.shared_options import Json
from lockstep.errors import JobError

if TYPE_CHECKING:
    from lockstep.coordinator.run_control import RunControl
    from lockstep.results.run_reader import RunReader

Dashboard = Annotated[
    bool, typer.Option("--dashboard", help="Serve a page that shows the run; see lockstep watch.")
]
LOSS_DIGITS = ".4g"
NICENESS = 10
"""Of the page's process: where all cores compute, it waits for a moment in which one does not."""


def add_to(app: typer.Typer) -> None:
    """Make the commands part of an application."""
    for command in (watch, runs, status, compare):
        app.command()(command)


@contextlib.contextmanager
def page_beside(wanted: bool) -> Iterator[RunControl | None]:
    """What a run is to be given as its control so that a page is served beside it, if wanted."""
    if not wanted:
        yield None
        return
    from lockstep.coordinator.run_control import RunControl
    from lockstep.dashboard.server import beside_run

    with beside_run() as start:
        yield RunControl(opened=start)


def watch(
    run: Annotated[Path, typer.Argument(help="A run folder, or a folder of runs.")] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 0,
    host: Annotated[
        str, typer.Option(help="The address to serve at. Others than 127.0.0.1 are not encrypted.")
    ] = "127.0.0.1",
    with_parent: Annotated[int, typer.Option("--with-parent", hidden=True)] = 0,
) -> None:
    """Show runs in the browser, while they go on and afterwards, and scale or stop them there."""
    from lockstep.dashboard.server import watch as serve
    from lockstep.system.process_title import set_title
    from lockstep.system.processes import die_with_parent

    if with_parent:
        die_with_parent(with_parent)
    set_title("dashboard", run.name)
    os.nice(NICENESS)
    serve(run, host=host, port=port, say=_say)


def _say(address: str) -> None:
    print(f"page         {address}", flush=True)


def runs(
    folder: Annotated[Path, typer.Argument(help="A folder of runs.")] = Path("runs"),
    as_json: Json = False,
) -> None:
    """List runs: how each stands, its metric and its fingerprint."""
    from lockstep.results.run_list import RunList

    rows = RunList(folder).summaries()
    if as_json:
        print(json.dumps(rows))
        return
    table = [["run", "status", "step", "metric", "workers", "recoveries", "fingerprint", "started"]]
    table += [
        [row["folder"], row["status"], f"{row['step']:,}/{row['steps'] or 0:,}", _metric(row),
         f"{row['workers'] or '–'}", str(row["recoveries"] or "–"), row["fingerprint"][:12] or "–",
         row["started"][:16].replace("T", " ") or "–"]
        for row in rows
    ]  # fmt: skip
    _print_table(table)


def status(
    run: Annotated[Path, typer.Argument(help="A run folder.")], as_json: Json = False
) -> None:
    """Show how a run stands: under way, stopped or finished."""
    reader, row = _summary(run)
    if as_json:
        print(json.dumps({**row, "workers_now": reader.history.states_now()}))
        return
    lines = [
        ("run", f"{row['folder']}, {row['status']}" + (f": {row['why']}" if row["why"] else "")),
        ("step", f"{row['step']:,} of {row['steps'] or 0:,}"),
        ("loss now", "" if row["loss"] is None else format(row["loss"], LOSS_DIGITS)),
        *((name, f"{value:.6g}") for name, value, _ in row["metrics"] if value is not None),
        ("speed", f"{row['rate']:,.0f} samples/s" if row["rate"] else ""),
        ("a step", _step(row)),
        ("plan", _plan(row)),
        ("recoveries", str(row["recoveries"] or "")),
        ("checkpoint", f"after step {row['checkpoints'][-1]:,}" if row["checkpoints"] else ""),
        ("fingerprint", row["fingerprint"]),
        ("holds for", row["holds_for"] if row["fingerprint"] else ""),
        ("started", row["started"][:19].replace("T", " ") + " UTC" if row["started"] else ""),
        ("command", row["command"]),
    ]
    for name, value in lines:
        if value:
            print(f"{name:<12} {_clean(value)}")
    for (host, worker), state in reader.history.states_now():
        if row["status"] in ("running", "paused"):
            print(f"worker {worker:<5} {state}, on {_clean(host)}")


def compare(
    a: Annotated[Path, typer.Argument(help="A run folder.")],
    b: Annotated[Path, typer.Argument(help="Another one.")],
    as_json: Json = False,
) -> None:
    """Compare two runs: settings, metrics, and the first step at which their ledgers differ."""
    from lockstep.results.run_comparison import differing_settings, find_parting

    (first, left), (second, right) = _summary(a), _summary(b)
    settings = differing_settings(first.manifest, second.manifest)
    parting = find_parting(a / "ledger.jsonl", b / "ledger.jsonl")
    if as_json:
        found = {"runs": [left, right], "settings": settings, "parting": asdict(parting)}
        print(json.dumps(found))
        return
    table = [["", left["folder"], right["folder"]], ["status", left["status"], right["status"]]]
    table += [[name, *values] for name, *values in settings]
    names = dict.fromkeys(name for row in (left, right) for name, _, _ in row["metrics"])
    values = [{name: value for name, value, _ in row["metrics"]} for row in (left, right)]
    for name in names:
        pair = [each.get(name) for each in values]
        table.append([name, *("–" if one is None else f"{one:.6g}" for one in pair)])
    table.append(["fingerprint", *(row["fingerprint"][:16] or "–" for row in (left, right))])
    _print_table(table)
    if parting.step is None:
        print(f"\nledgers      equal in all {parting.equal:,} steps that both have")
    else:
        print(f"\nledgers      equal up to step {parting.step:,}; there: {_clean(parting.what)}")


def _summary(run: Path) -> tuple[RunReader, dict[str, Any]]:
    from lockstep.results.run_reader import RunReader

    if not run.exists():
        raise JobError(f"there is no run {run}", fix="lockstep runs lists them")
    reader = RunReader(run)
    reader.refresh()
    return reader, reader.summary(run.resolve().name)


def _step(row: dict[str, Any]) -> str:
    """What a step takes, beside what it was predicted to take; empty if it was not."""
    seconds, predicted = row["step_seconds"], row["predicted_step_seconds"]
    if not seconds or not predicted:
        return ""
    return f"{seconds * 1e3:.3g} ms, {predicted * 1e3:.3g} ms predicted"


def _plan(row: dict[str, Any]) -> str:
    from lockstep.planning.core_split import Division

    counts = {name: row[name] or 0 for name in ("workers", "threads", "shards", "team")}
    hosts = f" on {len(row['hosts'])} hosts" if len(row["hosts"]) > 1 else ""
    return f"{Division(**counts)}{hosts}"


def _metric(row: dict[str, Any]) -> str:
    if row["metrics"]:
        name, value, _ = row["metrics"][0]
        return f"{name} {'–' if value is None else format(value, '.4g')}"
    return "–" if row["loss"] is None else f"loss {format(row['loss'], LOSS_DIGITS)}"


def _print_table(rows: list[list[str]]) -> None:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    for row in rows:
        cells = (f"{_clean(cell):<{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def _clean(text: str) -> str:
    from lockstep.system.messages import printable

    return printable(text).replace("\n", " ")
