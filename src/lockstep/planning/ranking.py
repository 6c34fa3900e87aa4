"""Ranking: predictions in the order in which they are to be chosen, and the choice. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lockstep.errors import ResourceError
from lockstep.planning.step_prediction import Prediction

PREFERENCE = 1.03
"""Whoever comes later in the order of preference must be faster by this factor: near ties always
go the same way."""
CLOSE = 1.15
"""Two measured ones that differ by less are measured once more."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A prediction, and what was measured of it."""

    prediction: Prediction
    measured: float | None = None
    """Seconds of a step."""

    @property
    def seconds(self) -> float:
        """Of a step, as well as is known."""
        return self.prediction.seconds if self.measured is None else self.measured

    @property
    def error(self) -> float | None:
        """By how much a measured step takes longer than predicted, of the prediction."""
        if self.measured is None or not self.prediction.seconds:
            return None
        return self.measured / self.prediction.seconds - 1.0


def rank(predictions: Sequence[Prediction]) -> list[Prediction]:
    """Those that fit, the best first, then the others, by how much is missing.

    The order that is given is that of preference, in which near ties go.
    """
    fitting = [each for each in predictions if each.fits]
    ranked = []
    while fitting:
        limit = min(each.seconds for each in fitting) * PREFERENCE
        ranked.append(next(each for each in fitting if each.seconds <= limit))
        fitting.remove(ranked[-1])
    others = [each for each in predictions if not each.fits]
    return ranked + sorted(others, key=lambda each: sum(each.missing.values()))


def check_fits(ranked: Sequence[Prediction]) -> None:
    """See that some candidate fits.

    Raises:
        ResourceError: none does; says how many bytes are missing for the nearest one.
    """
    if ranked[0].fits:
        return
    nearest = ranked[0]
    listed = ", ".join(
        f"{name} has {(nearest.memory[name] - missing) / 2**20:,.0f} MiB, {missing:,} bytes too few"
        for name, missing in nearest.missing.items()
    )
    needs = ", ".join(f"{size / 2**20:,.0f} MiB on {name}" for name, size in nearest.memory.items())
    raise ResourceError(
        "no plan for this job fits the memory that there is",
        expected=f"for the nearest one, {nearest.candidate}: {needs}",
        found=listed,
        fix="use fewer shards (each needs one gradient), a smaller model or batch_size, or a "
        "larger machine",
    )


def close(ranked: Sequence[Ranked]) -> bool:
    """Whether the two fastest of those measured are too close to be told apart by one trial."""
    measured = sorted(each.measured for each in ranked if each.measured is not None)
    return len(measured) > 1 and measured[1] < measured[0] * CLOSE


def choose(ranked: Sequence[Ranked]) -> Ranked:
    """The best of those measured; where none is, the best of all by prediction."""
    measured = [each for each in ranked if each.measured is not None] or ranked[:1]
    best, *others = measured
    for other in others:
        if other.seconds * PREFERENCE < best.seconds:
            best = other
    return best
