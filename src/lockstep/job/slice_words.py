"""Slice words: how a job, or a model's configuration, says which matrices are cut into slices."""

from __future__ import annotations

from collections.abc import Mapping

from lockstep.errors import JobError
from lockstep.system.spelling import meant

COLUMN_WORDS = ("colwise", "colwise_rep", "colwise_gather_output")
"""Outputs are joined where no row cut follows, so these are one."""
ROW_WORDS = ("rowwise", "rowwise_rep", "rowwise_split_input")
"""Whole inputs are split, so these are one."""
HEADS = "heads"
"""Of an `nn.MultiheadAttention`."""


def check_slices(slices: int, slice_plan: Mapping[str, str] | None, local_steps: int) -> None:
    """Check that a job's slices go with its other settings.

    Raises:
        JobError: they do not.
    """
    if slices > 1 and local_steps > 1:
        raise JobError(
            "slices do not go with local steps, whose optimizers see whole parameters",
            expected="slices = 1, or local_steps = 1",
            found=f"slices = {slices}, local_steps = {local_steps}",
            fix="leave one out",
        )
    if slice_plan is None:
        return
    if slices == 1:
        raise JobError(
            "slice_plan is given without slices",
            expected="slices >= 2, with slice_plan",
            found="slices = 1",
            fix="set slices, or leave slice_plan out",
        )
    known = (*COLUMN_WORDS, *ROW_WORDS, HEADS)
    for module, word in slice_plan.items():
        if not isinstance(module, str) or word not in known:
            near = meant(str(word), known)
            raise JobError(
                f"slice_plan has an unknown word for {module}",
                expected=", ".join(known),
                found=repr(word),
                fix=f"write {near}" if near else "choose one of these, or leave the module out",
            )
