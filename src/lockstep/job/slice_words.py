"""Slice words: how a job, or a model's configuration, says which matrices are cut into slices.

And which settings go with slices, and with teams that compute them.
"""

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


MOST_BOARDS = 120
"""Of teams over hosts, on each host: an agent is passed two descriptors for each, and the kernel
takes 253 at a time."""


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


def check_team(team: int, slices: int, workers: int | None, *, compiled: bool) -> None:
    """Check that teams go with a job's other settings. `workers`: None where it leaves them open.

    Raises:
        JobError: they do not.
    """
    if team == 1:
        return
    if slices == 1:
        raise JobError(
            "team is given without slices: its members would have nothing to divide",
            expected="slices >= team, with team",
            found=f"team = {team}, slices = 1",
            fix=f"set slices to {team} or more (the numbers depend on it), or leave team out",
        )
    if team > slices:
        raise JobError(
            "a team has more members than there are slices: some would never have work",
            expected=f"team <= slices = {slices}",
            found=f"team = {team}",
            fix=f"set team to {slices} or fewer, or slices to {team} (the numbers depend on it)",
        )
    if workers is not None and team > workers:
        raise JobError(
            "a team has more members than there are workers",
            expected=f"team <= workers = {workers}",
            found=f"team = {team}",
            fix=f"set workers to {team} or more, or team to {workers} or fewer",
        )
    if compiled:
        raise JobError(
            "compile does not go with teams: a compiled shard runs as a whole",
            expected="team = 1, or compile = false",
            found=f"team = {team}, compile = true",
            fix="leave one out",
        )


def several_hosts(team: int, found: str) -> JobError:
    """What to raise where there are other hosts than this one."""
    return JobError(
        "teams are for one host, for now: their members share memory",
        expected="team = 1, or this host alone",
        found=f"team = {team}, with {found}",
        fix="leave team out: slices go with several hosts, and the results are the same",
    )
