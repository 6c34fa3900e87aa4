"""Divergence check: hosts must have recorded the same digests of the same steps."""

from __future__ import annotations

from lockstep.agent.step_log import StepLog
from lockstep.errors import IntegrityError


class DivergenceCheck:
    """Holds what hosts have told until the master has recorded the step itself."""

    def __init__(self) -> None:
        self._told: dict[tuple[str, int], str] = {}
        """By host and step, a digest of its record."""

    def told(self, name: str, step: int, digest: str) -> None:
        """A host has recorded a step."""
        self._told[name, step] = digest

    def check(self, own_name: str, step_log: StepLog) -> None:
        """Compare with what the master has recorded: losses, and parts of the state.

        Raises:
            IntegrityError: it is not the same.
        """
        for (name, step), digest in list(self._told.items()):
            if step >= step_log.step:
                continue  # not recorded here yet
            del self._told[name, step]
            mine = step_log.marks.get(step, digest)
            if mine != digest:
                raise IntegrityError(
                    f"host {name} and host {own_name} have computed different states",
                    expected=f"the same record of step {step}: {mine}",
                    found=digest,
                    fix="look for faulty memory on both; then resume from the last checkpoint",
                )
