"""Settings: what is derived from their one declaration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockstep.errors import JobError
from lockstep.job.job import SETTINGS, Job
from lockstep.job.job_file import read_job_file
from lockstep.job.settings import setting, settings_of
from lockstep.job.settings_table import fill_in
from lockstep.results.manifest import IDENTITY


def refusal(**settings: Any) -> JobError:
    with pytest.raises(JobError) as caught:
        Job(task="mnist", **settings)
    return caught.value


@pytest.mark.parametrize("name", [n for n, s in SETTINGS.items() if s.kind.option in (int, float)])
@pytest.mark.parametrize("value", [True, False, "1", [1], np.bool_(True)])
def test_what_is_no_number(name: str, value: object) -> None:
    error = refusal(**{name: value})
    assert error.what == f"{name} has the wrong type"
    assert error.expected == ("a whole number" if SETTINGS[name].kind.option is int else "a number")
    assert error.found == repr(value)


@pytest.mark.parametrize("kind", [np.int8, np.uint16, np.int64])
def test_numpys_whole_numbers(kind: type) -> None:
    job = Job(task="mnist", batch_size=kind(32), data_epochs=kind(2))
    assert (job.batch_size, job.data_epochs) == (32, 2)
    assert type(job.batch_size) is int
    assert type(job.data_epochs) is int


def test_other_numbers() -> None:
    given: dict[str, Any] = {"audit": np.float32(0.25), "data_epochs": Fraction(1, 2)}
    job = Job(task="mnist", host_seconds=5, **given)
    assert (job.audit, job.data_epochs, job.host_seconds) == (0.25, 0.5, 5)
    assert type(job.audit) is type(job.data_epochs) is float
    assert type(job.host_seconds) is int  # in a manifest's digest, 5 is not 5.0
    assert refusal(batch_size=2.0).expected == "a whole number"
    assert refusal(batch_size=np.float64(2)).expected == "a whole number"


def test_paths_and_names() -> None:
    assert Job(task="mnist", out=Path("runs/a")).out == "runs/a"
    assert refusal(out=b"runs").expected == "a str or a pathlib.Path"
    assert Job(task="mnist", ownership="servers", servers=["a", "b"]).servers == ("a", "b")
    assert refusal(servers="a").expected == refusal(servers=[1]).expected == "names of hosts"
    assert "host:port" in refusal(cluster=["a:1"]).expected
    assert refusal(evaluate=1).expected == "true or false"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("batch_size", 0, "at least 1"),
        ("seed", 2**63, f"at least 0, at most {2**63 - 1}"),
        ("seed", -1, f"at least 0, at most {2**63 - 1}"),
        ("threads", 1025, "at least 1, at most 1024"),
        ("audit", 1.5, "at least 0, at most 1"),
        ("host_seconds", 0.25, "at least 0.5"),
        ("checkpoint_seconds", math.inf, "at least 0"),
        ("data_epochs", math.nan, "at least 0"),
        ("clip_grad_norm", 0, "a number above 0"),
        ("clip_grad_norm", math.nan, "a number above 0"),
    ],
)
def test_ranges(name: str, value: float, expected: str) -> None:
    error = refusal(**{name: value})
    assert (error.what, error.expected) == (f"{name} is out of range", expected)
    assert error.found == repr(value)


def test_choices() -> None:
    error = refusal(precision=16)
    assert error.what == "precision is not one of its values"
    assert (error.expected, error.found) == ("fp32 or bf16", "16")


def test_none_is_a_value_only_where_the_plan_decides() -> None:
    optional = {name for name, each in SETTINGS.items() if each.optional}
    assert optional == {name for name, each in SETTINGS.items() if each.default is None}
    nothing: dict[str, Any] = dict.fromkeys(optional)
    Job(task="mnist", **nothing)
    for name in SETTINGS.keys() - optional:
        assert refusal(**{name: None}).found == "None"


def test_defaults_are_values() -> None:
    for each in SETTINGS.values():
        assert each.checked(each.default) == each.default


def test_settings_that_depend_on_each_other_in_a_job_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("task: mnist\ngroups: 2\ncompression: bf16\n")
    assert read_job_file(path).groups == 2
    path.write_text("task: mnist\nservers: [a]\nownership: servers\n")
    assert read_job_file(path).servers == ("a",)
    path.write_text("task: mnist\ngroups: 2\n")
    with pytest.raises(JobError, match="without compression"):
        read_job_file(path)


def test_the_identity_of_a_run() -> None:
    """A field more or less would give every recorded run another digest."""
    assert sorted(IDENTITY) == sorted((
        "shards", "threads", "steps", "batch_size", "eval_batch_size", "train_samples",
        "eval_samples", "local_steps", "compression", "groups", "seed", "clip_grad_norm",
        "precision", "numerics",
    ))  # fmt: skip


def test_a_declaration() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Given:
        plain: int = 1
        rate: float | None = setting(None, help="Rate.", above=0, most=2, unset="found out")

    given = settings_of(Given)
    assert list(given) == ["rate"]
    assert (given["rate"].default_text, given["rate"].optional) == ("found out", True)
    assert given["rate"].checked(2) == 2
    with pytest.raises(JobError) as caught:
        given["rate"].checked(3)
    assert caught.value.expected == "a number above 0, at most 2"


def test_a_page_without_markers() -> None:
    with pytest.raises(ValueError, match="has no lines"):
        fill_in("# Job files\n")


def test_a_mapping_is_kept() -> None:
    cluster: Mapping[str, list[str]] = {"worker": ["a:1"]}
    assert Job(task="mnist", cluster=cluster).cluster == cluster
