"""Fixtures for tests of both ways to run a step: by the interpreter, and by the native library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lockstep.errors import ResourceError
from lockstep.native.build import build, compiler
from lockstep.native.library import load_library
from tests.support.harmed_runs import events


@pytest.fixture(scope="session")
def native_module() -> Any:
    """The library, which is built if it is not there."""
    try:
        compiler()
    except ResourceError as error:
        pytest.skip(error.what)
    build(print)
    load_library.cache_clear()
    found = load_library()
    assert found.module is not None, found.why_not
    return found.module


@pytest.fixture(params=["never", "auto"])
def native(request: pytest.FixtureRequest) -> str:
    """The setting of this name; with `auto` the library is there."""
    if request.param == "auto":
        request.getfixturevalue("native_module")
    return str(request.param)


def taken(folder: str | Path) -> set[int]:
    """The workers of a run whose steps were native."""
    return {event["worker"] for event in events(folder, "native") if not event["why_not"]}


def refused(folder: str | Path) -> set[str]:
    """Why workers' steps were not."""
    return {event["why_not"] for event in events(folder, "native")} - {""}
