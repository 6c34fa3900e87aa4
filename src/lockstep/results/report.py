"""Report: one HTML page about a run, made from the files of its folder alone.

The page is self-contained: no scripts, fonts, images or requests, which its content security
policy enforces. Every string from the run is escaped. The same files give the same bytes, once the
run has ended.
 A ledger of any length is read once, in constant memory.
"""

from __future__ import annotations

import json
import os
import shlex
from collections import deque
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from lockstep.errors import RunFolderError
from lockstep.results.charts import figure, loss_panel, mapping, metric_panels, number
from lockstep.results.event_schema import Unknown, parse_event
from lockstep.results.event_words import describe_event
from lockstep.results.run_history import PHASES as SPENT
from lockstep.results.run_history import RunHistory, latest
from lockstep.results.run_reader import RunReader, read_lines
from lockstep.results.run_summary import details, shown, summarise
from lockstep.results.timeline_chart import timeline_chart

PHASES = {
    "compute": "computing",
    "data": "loading data",
    "wait": "waiting",
    "reduce": "reducing",
    "exchange": "exchange with hosts",
    "update": "updating",
    "evaluate": "evaluating",
}
"""What workers spend their time on, in the order of the bars, with the page's names."""
LAST_EVENTS = 200


def write_report(folder: Path) -> Path:
    """Write `report.html` into the run folder `folder` and return its path.

    Only `manifest.json` is required; parts whose files are missing are left out. The page is
    replaced atomically.

    Raises:
        RunFolderError: `folder` has no manifest, or a file in it is not readable.
    """
    page = _page(folder)
    path = folder / "report.html"
    draft = path.with_name(f".report.{os.getpid()}.html")
    try:
        # A surrogate from a JSON escape or an undecodable file name has no UTF-8 form.
        draft.write_text(page, encoding="utf-8", errors="replace")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise RunFolderError(f"the report could not be written: {error}") from error
    return path


def _page(folder: Path) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    manifest = _read_object(folder / "manifest.json", required=True)
    result = _read_object(folder / "result.json")
    reader = RunReader(folder)
    reader.read_events()
    summary = summarise(folder.resolve().name, manifest, result, reader.history, reader.status)
    settled = details(manifest)
    task = [["task", summary["task"]]] if summary["task"] else []
    plan = mapping(manifest.get("plan"))
    events, events_total = _last_events(folder / "events.jsonl")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files("lockstep.results") / "report.html.j2"
    return environment.from_string(source.read_text(encoding="utf-8")).render(
        name=_text(manifest.get("name") or folder.resolve().name),
        summary=summary,
        started=summary["started"][:19].replace("T", " "),
        fingerprint=_text(result["fingerprint"]) if result.get("fingerprint") else "",
        finished=bool(result),
        figures=_figures({**_so_far(summary), **result, **_step_times(summary)}),
        loss=loss_panel(read_lines(folder / "ledger.jsonl")),
        metrics=metric_panels(_list(result.get("history")) or _evaluations(reader.history)),
        final_metrics=_final_metrics(summary["metrics"]),
        phases=list(PHASES.items()),
        workers=_workers(_all_times(result, reader.history)),
        timeline=timeline_chart(reader.history),
        plan=_rows({key: plan[key] for key in plan if key != "reasons"}),
        reasons=[_text(reason) for reason in _list(plan.get("reasons"))],
        recoveries=_table(_list(result.get("recoveries"))),
        recovered=[row[3] for row in reader.history.bands.rows if row[2] == "recovering"],
        events=events,
        events_total=events_total,
        changed=[*task, *settled["changed"]],
        same=settled["same"],
        machine=_rows({**mapping(manifest.get("versions")), **mapping(manifest.get("profile"))}),
        checkpoints=[_text(checkpoint) for checkpoint in _list(result.get("checkpoints"))],
        run=shlex.quote(folder.resolve().name),
    )


def _so_far(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Of a run without a result: the figures that a result has."""
    return {
        "steps": summary["step"],
        "samples_per_second": summary["rate"],
        "wall_seconds": summary["seconds"] or None,
        "workers": summary["workers"],
        "shards": summary["shards"],
        "threads": summary["threads"],
    }


def _step_times(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a step takes, beside what it was predicted to take, if it was."""
    names = ("step_seconds", "predicted_step_seconds")
    return {name: summary[name] for name in names if summary["predicted_step_seconds"]}


def _evaluations(history: RunHistory) -> list[dict[str, Any]]:
    """The held-out metrics that the events tell of, as a result has them."""
    rows = latest(history.evaluations.rows)
    return [{"step": step, "metrics": metrics} for _, step, metrics in rows]


def _all_times(result: Mapping[str, Any], history: RunHistory) -> dict[str, Any]:
    """What each worker spent its time on: the result's for the master's host, and what the events
    tell of all others."""
    times = dict(mapping(result.get("times")))
    several = len({host for host, _ in history.lanes.rows}) > 1
    sums: dict[int, list[float]] = {}
    for lane, _, _, spent in history.times.rows:
        before = sums.get(lane, [0.0] * len(spent))
        sums[lane] = [a + b for a, b in zip(before, spent, strict=True)]
    for lane, spent in sums.items():
        host, worker = history.lanes.rows[lane]
        name = f"{worker} of {host}" if several and host != history.master else str(worker)
        if name not in times:
            times[name] = dict(zip(SPENT, spent, strict=True))
    return times


# Reading


def _read_object(path: Path, *, required: bool = False) -> dict[str, Any]:
    """The JSON object in `path`; empty if the file is not there and not required."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        if not required:
            return {}
        raise RunFolderError(
            f"{path.parent} is not a run folder", expected=path.name, found="no such file"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunFolderError(f"{path} cannot be read", found=str(error)) from error
    if not isinstance(value, dict):
        raise RunFolderError(
            f"{path} cannot be read", expected="a JSON object", found=type(value).__name__
        )
    return value


def _last_events(path: Path) -> tuple[list[tuple[str, str, list[tuple[str, str]]]], int]:
    """The last events, newest first, as `(time, event, fields)`, and the number of all events."""
    kept: deque[dict[str, Any]] = deque(maxlen=LAST_EVENTS)
    total = 0
    for event in read_lines(path):
        if event.get("event") not in ("progressed", "timed"):  # curves and lanes show these
            kept.append(event)
            total += 1
    rows = []
    for event in reversed(kept):
        line = json.dumps(event).encode()
        known = parse_event(line)
        time, name = _text(event.pop("time", "")), _text(event.pop("event", ""))
        words = known is not None and not isinstance(known, Unknown)
        told = [("", describe_event(known))] if words and known else _rows(event, rounded=True)
        rows.append((time, name, told))
    return rows, total


# Tables


class Worker(NamedTuple):
    """A worker's bar: `parts` are `(phase, seconds, percent of the longest bar)`."""

    name: str
    seconds: str
    parts: list[tuple[str, str, float]]


def _workers(times: Mapping[str, Any]) -> list[Worker]:
    """A bar for each worker, in the order of worker_ids, all on one scale."""
    spent: dict[str, dict[str, float]] = {}
    for worker in sorted(times, key=_natural):
        seconds = {phase: number(mapping(times[worker]).get(phase)) for phase in PHASES}
        spent[_text(worker)] = {phase: s for phase, s in seconds.items() if s is not None and s > 0}
    longest = max((sum(phases.values()) for phases in spent.values()), default=0.0)
    return [
        Worker(
            name,
            _seconds(sum(phases.values())),
            [(phase, _seconds(s), 100 * s / longest) for phase, s in phases.items()],
        )
        for name, phases in spent.items()
    ]


def _natural(key: Any) -> tuple[int, str]:
    """Sorts worker 2 before worker 10."""
    digits = "".join(filter(str.isdecimal, str(key)))[:18]
    return (int(digits) if digits else -1, str(key))


def _figures(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The key figures that are known, as `(label, value)`."""
    labels = {
        "steps": "steps",
        "samples_per_second": "samples per second",
        "step_seconds": "a step",
        "predicted_step_seconds": "a step, as predicted",
        "wall_seconds": "wall time",
        "startup_seconds": "start-up",
        "workers": "workers",
        "shards": "shards",
        "threads": "threads per worker",
    }
    figures = []
    for key, label in labels.items():
        value = number(result.get(key))
        if value is not None:
            figures.append((label, (_seconds if key.endswith("seconds") else figure)(value)))
    share = number(result.get("data_wait"))
    if share is not None:
        figures.append(("waiting for data", f"{100 * share:.3g} %"))
    if isinstance(result.get("recoveries"), list):
        figures.append(("recoveries", figure(len(result["recoveries"]))))
    return figures


def _final_metrics(
    metrics: Iterable[tuple[str, float | None, float | None]],
) -> list[tuple[str, str]]:
    """The metrics of the final state, each with its baseline if there is one; the one that matters
    most comes first."""
    rows = []
    for name, value, baseline in metrics:
        shown = "null" if value is None else figure(value)
        rows.append((name, shown if baseline is None else f"{shown} (baseline {figure(baseline)})"))
    return rows


def _rows(values: Mapping[str, Any], *, rounded: bool = False) -> list[tuple[str, str]]:
    """The items of `values` as text; if `rounded`, floats with four digits."""
    return [(_text(key), _text(value, rounded=rounded)) for key, value in values.items()]


class Table(NamedTuple):
    """A table with headings; a missing cell is empty."""

    columns: list[str]
    rows: list[list[str]]


def _table(entries: Iterable[Any]) -> Table:
    """A table of mappings, whose keys may differ."""
    mappings = [mapping(entry) for entry in entries]
    keys = list(dict.fromkeys(key for each in mappings for key in each))
    rows = [[_text(each.get(key, ""), rounded=True) for key in keys] for each in mappings]
    return Table([_text(key).replace("_", " ") for key in keys], rows)


# Values


def _text(value: Any, *, rounded: bool = False) -> str:
    """A JSON value as text of bounded length."""
    return figure(value) if rounded and isinstance(value, float) else shown(value)


def _seconds(value: float) -> str:
    """A duration in milliseconds, seconds, minutes or hours."""
    if value < 1:
        return f"{1000 * value:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
