"""What the screen says about recoveries."""

from __future__ import annotations

import platform
from typing import Any

from lockstep.results.recoveries import describe_recovery, summarise_recoveries

WORKER: dict[str, Any] = {
    "host": platform.node(), "worker": 1, "pid": 5640, "step": 1066, "phase": "shard", "shard": 3,
    "batch": None,
    "how": "was killed by SIGKILL", "detection_ms": 0.4, "regroup_ms": 3.0, "recomputed": 0,
    "steps_back": 0, "recovery_ms": 19.2,
}  # fmt: skip
HOST: dict[str, Any] = {
    **WORKER, "host": "b", "worker": None, "how": "silent for 2 s", "recovery_ms": 2100.0,
}  # fmt: skip


def test_a_worker() -> None:
    assert describe_recovery(WORKER) == (
        "worker 1, pid 5640, was killed by SIGKILL at step 1,066: back in 19 ms, nothing lost"
    )
    again = {**WORKER, "host": "a", "recomputed": 5, "steps_back": 2}
    assert describe_recovery(again) == (
        "worker 1 of a, pid 5640, was killed by SIGKILL at step 1,066: "
        "back in 19 ms, 2 steps computed again"
    )


def test_a_host() -> None:
    assert describe_recovery({**HOST, "step": 7}) == (
        "host b was lost at step 7 (silent for 2 s): back in 2.1 s, nothing lost"
    )


def test_of_many_the_number_and_the_longest() -> None:
    assert summarise_recoveries([]) == ""
    assert summarise_recoveries([WORKER]) == describe_recovery(WORKER)
    assert summarise_recoveries([WORKER, HOST, WORKER]) == (
        "2 workers and 1 host died; the longest pause was 2.1 s; no step was lost"
    )
