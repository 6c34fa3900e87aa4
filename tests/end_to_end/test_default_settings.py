"""The promise with no settings: one fingerprint, whatever the machine and the number of workers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lockstep.recipes.datasets import find
from tests.support import command

RECIPES = {
    "mnist": (), "mnist-cnn": ("--model", "cnn"), "vision": (), "recommend": (), "clicks": (),
    "translate": (), "summarise": (), "game": (), "cartpole": (),
}  # fmt: skip


DATA = {
    "vision": "fashion-mnist", "recommend": "movielens-100k", "clicks": "adult",
    "translate": "descriptions", "summarise": "descriptions",
}  # fmt: skip
"""The data sets of recipes; where they are not, the recipe is not tried."""


def fingerprints(folder: Path, *job: str, steps: int) -> set[str]:
    """Those of a job on one core and on all, by default and on 1, 2 and 3 workers."""
    found, cores = set(), os.sched_getaffinity(0)
    everywhere = ((), ("-w", "3"))
    for visible, counts in (
        ({min(cores)}, everywhere), (cores, (*everywhere, ("-w", "1"), ("-w", "2")))
    ):  # fmt: skip
        for workers in counts:
            os.sched_setaffinity(0, visible)
            try:
                ended = command.lockstep(
                    "run", *job, "--steps", str(steps), *workers, "--json", "-q", cwd=folder
                )
            finally:
                os.sched_setaffinity(0, cores)
            assert ended.returncode == 0, ended.stderr
            found.add(json.loads(ended.stdout)["fingerprint"])
    return found


def test_a_bare_task(tmp_path: Path) -> None:
    assert len(fingerprints(tmp_path, f"{command.TASKS}:Blobs", steps=6)) == 1


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe(recipe: str, tmp_path: Path) -> None:
    name = recipe.partition("-")[0]
    if name in DATA and find(DATA[name]).where() == "not here":
        pytest.skip(f"needs the data set {DATA[name]}: {find(DATA[name]).command}")
    # Evaluation changes no state, and translating all validation pairs takes minutes.
    job = tmp_path / "job.yaml"
    job.write_text(f"task: {name}\nevaluate: false\n")
    assert len(fingerprints(tmp_path, str(job), *RECIPES[recipe], steps=3)) == 1
