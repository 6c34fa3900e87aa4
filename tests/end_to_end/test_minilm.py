"""examples/minilm.py: real weights, where they have been fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import lockstep
from lockstep.recipes.datasets import find, minilm_folder

EXAMPLE = Path(__file__).parents[2] / "examples" / "minilm.py"


def test_two_steps_of_minilm(run_folders: Callable[[], str]) -> None:
    pytest.importorskip("transformers", reason="needs the extra transformers")
    for name in ("minilm", "descriptions"):
        if find(name).where() == "not here":
            pytest.skip(f"needs the data set {name}: {find(name).command}")
    result = lockstep.run(
        f"{EXAMPLE}:minilm", args={"steps": 2, "batch_size": 6, "pairs": 300}, workers=2, shards=2,
        threads=1, quiet=True, out=run_folders(),
    )  # fmt: skip
    # The weights have learned before: of 30 descriptions they find most, and still do.
    assert min(result.baseline["accuracy"], result.metrics["accuracy"]) > 0.7
    before = load_file(minilm_folder() / "model.safetensors")
    after = load_file(result.folder / "model.safetensors")
    learned = [name for name in before if name.endswith("dense.weight") and "layer" in name]
    assert len(learned) == 18
    assert not any(before[name].equal(after[f"encoder.{name}"]) for name in learned)
