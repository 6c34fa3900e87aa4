"""Run summary: what a run is and how it stands, as one JSON object. Pure.

`lockstep runs` and `status`, the page and the report all show it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lockstep.job.job import SETTINGS
from lockstep.results.charts import mapping, number
from lockstep.results.manifest import scope_of
from lockstep.results.master_process import shown_command
from lockstep.results.run_history import RunHistory, latest

LONGEST = 400
"""Longer values are cut."""
LIVE = ("running", "paused")
"""The statuses in which a run takes requests."""


def summarise(
    folder: str,
    manifest: Mapping[str, Any],
    result: Mapping[str, Any],
    history: RunHistory,
    status: str,
) -> dict[str, Any]:
    """The summary of a run: `folder` is its name, `status` that of its reader."""
    plan, first = mapping(manifest.get("plan")), history.first
    progress = latest(history.progress.rows)
    last = progress[-1] if progress else [None] * 9
    live = status in LIVE
    lost = [lane for lane, state in history.states_now() if state == "dead"]
    return {
        "folder": folder,
        "name": shown(manifest.get("name") or folder),
        "task": shown(mapping(manifest.get("source")).get("name") or ""),
        "status": status,
        "why": history.ended.why if history.ended is not None and status != "finished" else "",
        "started": history.started,
        "command": shown_command(first.command) if first is not None else "",
        "parameters": first.parameters if first is not None else None,
        "step": whole(result.get("steps")) or history.step,
        "steps": whole(plan.get("steps")),
        "seconds": number(result.get("wall_seconds")) or history.now,
        "loss": last[2],
        **_pace(plan, number(result.get("samples_per_second")) or last[5], history),
        "workers": len(history.working) if live else whole(plan.get("workers")),
        "target": history.target or whole(plan.get("workers")) if live else None,
        "dead": [list(lane) for lane in lost],
        "most_workers": whole(plan.get("seats")) or whole(plan.get("max_workers")),
        "shards": whole(plan.get("shards")),
        "team": whole(plan.get("team")) or 1,
        "threads": whole(plan.get("threads")),
        "hosts": sorted({host for host, _ in history.lanes.rows}),
        "fingerprint": shown(result.get("fingerprint") or ""),
        "holds_for": scope(manifest),
        "metrics": final_metrics(result, history),
        "recoveries": len(history.recoveries),
        "checkpoints": history.checkpoints[-20:],
        "verified": merge_spans([(each.first, each.last) for each in history.verified]),
        "final_verified": any(each.final for each in history.verified),
    }


def _pace(plan: Mapping[str, Any], rate: float | None, history: RunHistory) -> dict[str, Any]:
    """The throughput and what a step takes, each beside what the plan has predicted of it."""
    batch, planned = whole(plan.get("batch_size")), history.planned
    seconds = planned.predicted if planned else None
    predicted = None
    if planned and seconds and batch:
        predicted = {"rate": batch / seconds, "workers": planned.workers, "how": "the plan"}
    return {
        "rate": rate,
        "predicted": predicted,
        "step_seconds": batch / rate if batch and rate else None,
        "predicted_step_seconds": seconds,
    }


def details(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What does not change while a run goes on: settings, plan, reasons, machine."""
    plan = mapping(manifest.get("plan"))
    reasons = plan.get("reasons")
    changed, same = split_settings(manifest)
    return {
        "changed": changed,
        "same": same,
        "plan": [[shown(key), shown(plan[key])] for key in plan if key not in ("reasons", "cuts")],
        "reasons": [shown(each) for each in reasons] if isinstance(reasons, list) else [],
        "machine": [
            [shown(key), shown(value)]
            for part in ("versions", "profile")
            for key, value in mapping(manifest.get(part)).items()
        ],
    }


def split_settings(manifest: Mapping[str, Any]) -> tuple[list[list[str]], list[list[str]]]:
    """The settings that differ from their defaults, the task's arguments first; and the others."""
    args = mapping(mapping(manifest.get("source")).get("args"))
    changed = [[shown(name), shown(value)] for name, value in args.items()]
    same = []
    for name, value in mapping(manifest.get("job")).items():
        setting = SETTINGS.get(name)
        row = [shown(name), shown(value)]
        if setting is None or _plain(value) != _plain(setting.default):
            changed.append(row)
        else:
            same.append([row[0], setting.default_text or "–"])
    return changed, same


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def scope(manifest: Mapping[str, Any]) -> str:
    """For which workers the fingerprint holds, in words; empty if the manifest does not say."""
    try:
        return scope_of(manifest)
    except (KeyError, TypeError):
        return ""


def final_metrics(
    result: Mapping[str, Any], history: RunHistory
) -> list[tuple[str, float | None, float | None]]:
    """`(name, value, baseline)` of the last metrics, the one that matters most first: what has a
    baseline, then what the task itself scores, then losses."""
    metrics = mapping(result.get("metrics"))
    if not metrics and history.evaluations.rows:
        metrics = latest(history.evaluations.rows)[-1][2]
    baseline = mapping(result.get("baseline"))
    rows = [
        (shown(name), number(value), number(baseline.get(name))) for name, value in metrics.items()
    ]
    return sorted(rows, key=lambda row: (row[2] is None, "loss" in row[0], row[0] == "train_loss"))


def merge_spans(spans: list[tuple[int, int]]) -> list[list[int]]:
    """Spans of steps, in order, overlapping ones as one."""
    merged: list[list[int]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], last)
        else:
            merged.append([first, last])
    return merged


def whole(value: Any) -> int | None:
    """`value` if it is a whole number, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def shown(value: Any) -> str:
    """A JSON value as text of bounded length."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"
