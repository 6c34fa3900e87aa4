"""Tuning: settings that change a job's numbers, tried for what they would save.

Nothing here is ever chosen by itself: another V, other threads or another precision give other
results, so they belong into the job file, where everybody sees them. Of each setting the profile is
measured, and the best plan predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.agent.local_host import LocalHost
from lockstep.api.planner import decide_alone
from lockstep.errors import LockstepError
from lockstep.job.job import Job
from lockstep.planning.core_split import Facts, shards_of
from lockstep.planning.ranking import Ranked
from lockstep.planning.variations import variations

GAIN = 1.05
"""Settings that save less are not worth other numbers."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """Settings, and the best plan with them."""

    settings: Mapping[str, Any]
    best: Ranked | None
    why_not: str = ""
    speedup: float = 0.0
    """How many times as fast it is as the job as it stands; 0: it cannot be run so."""

    @property
    def worth_it(self) -> bool:
        return self.speedup >= GAIN

    def line(self) -> str:
        """The lines for the job file, in YAML."""
        return "\n".join(f"{name}: {value}" for name, value in self.settings.items())


def try_settings(
    job: Job,
    facts: Facts,
    host: LocalHost,
    now: Ranked,
    *,
    say: Callable[[str], object] = lambda _: None,
) -> list[Tried]:
    """Other settings that change numbers, the fastest first. `now` is the plan without them."""
    found = []
    for settings in variations(job, shards_of(job), facts.cores):
        words = ", ".join(f"{name} {value}" for name, value in settings.items())
        say(f"trying {words}")
        try:
            decision = decide_alone(job.replace(**settings), facts, host, measure=0, force=True)
        except LockstepError as error:
            found.append(Tried(settings=settings, best=None, why_not=error.what))
            continue
        best = decision.chosen
        if best is None:
            found.append(Tried(settings=settings, best=None, why_not="it could not be measured"))
        else:
            speedup = now.prediction.seconds / best.prediction.seconds
            found.append(Tried(settings=settings, best=best, speedup=speedup))
    return sorted(found, key=lambda each: -each.speedup)
