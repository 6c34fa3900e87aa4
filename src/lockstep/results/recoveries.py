"""Recoveries: what the record of a recovery says in words, for the screen and the summary."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any


def describe_recovery(record: Mapping[str, Any]) -> str:
    """One line: who died of what, and what it cost."""
    where = f"at step {record['step']:,}"
    if record.get("worker") is None:
        who = f"host {record['host']} was lost {where} ({record['how']})"
    else:
        host = "" if record.get("host") in ("", None, platform.node()) else f" of {record['host']}"
        who = f"worker {record['worker']}{host}, pid {record['pid']}, {record['how']} {where}"
    return f"{who}: back in {_duration(record['recovery_ms'])}, {_cost(record)}"


def summarise_recoveries(records: Sequence[Mapping[str, Any]]) -> str:
    """All recoveries of a run, in one line; empty if there were none."""
    if len(records) <= 1:
        return "".join(map(describe_recovery, records))
    hosts = sum(record.get("worker") is None for record in records)
    died = [_count(len(records) - hosts, "worker"), _count(hosts, "host")]
    longest = max(record["recovery_ms"] for record in records)
    return (
        f"{' and '.join(filter(None, died))} died; "
        f"the longest pause was {_duration(longest)}; no step was lost"
    )


def _cost(record: Mapping[str, Any]) -> str:
    again = _count(record.get("steps_back", 0), "step")
    return f"{again} computed again" if again else "nothing lost"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}" if number else ""


def _duration(milliseconds: float) -> str:
    return f"{milliseconds:.0f} ms" if milliseconds < 1000 else f"{milliseconds / 1000:.1f} s"
