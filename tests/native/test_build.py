"""The native library is built by a command, for one user, and loaded only if nobody else may have
written it."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lockstep.errors import ResourceError
from lockstep.native import build as build_module
from lockstep.native import sources
from lockstep.native.build import arguments, build, compiler
from lockstep.native.library import BUILD, load_library
from tests.support import command
from tests.support.native_path import native_module

__all__ = ["native_module"]  # a fixture


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def load() -> Any:
    """Loads anew, and forgets it."""
    load_library.cache_clear()
    yield load_library
    load_library.cache_clear()


@pytest.fixture
def copied(cache: Path, native_module: Any) -> Path:
    """The library in this cache, as it was built."""
    path = sources.library_path()
    path.parent.mkdir(parents=True, mode=0o700)
    shutil.copyfile(native_module.__file__, path)
    path.chmod(0o700)
    return path


def test_without_it_the_reason_names_the_command(cache: Path, load: Any) -> None:
    found = load()
    assert found.module is None
    assert BUILD in found.why_not


def test_it_is_loaded(copied: Path, load: Any) -> None:
    assert load().why_not == ""


def test_it_is_there_already(copied: Path) -> None:
    said: list[str] = []
    assert build(said.append) == copied
    assert said == [f"it is there already: {copied}"]


def test_it_is_built_again_if_asked(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "_run", lambda command: pytest.skip("built"))
    with pytest.raises(pytest.skip.Exception, match="built"):
        build(print, again=True)


def others_may_write(path: Path) -> None:
    path.chmod(0o720)


def others_may_replace(path: Path) -> None:
    path.parent.chmod(0o707)


def a_link(path: Path) -> None:
    path.rename(path.with_suffix(".kept"))
    path.symlink_to(path.with_suffix(".kept"))


@pytest.mark.parametrize("change", [others_may_write, others_may_replace, a_link])
def test_what_others_may_have_written_is_not_loaded(
    change: Callable[[Path], None], copied: Path, load: Any
) -> None:
    change(copied)
    found = load()
    assert found.module is None
    assert str(copied.parent) in found.why_not


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_what_is_another_users_is_not_loaded(copied: Path, load: Any) -> None:
    os.chown(copied, 12345, 12345)
    assert "another user's" in load().why_not


def test_what_is_no_library_is_not_loaded(copied: Path, load: Any) -> None:
    copied.write_bytes(b"cut short")
    found = load()
    assert found.module is None
    assert found.why_not.startswith("it cannot be loaded")


def test_the_name_changes_with_the_sources(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sources.library_path()
    changed = tmp_path / "changed.cpp"
    changed.write_text("// another one")
    monkeypatch.setattr(sources, "source_files", lambda: [changed])
    assert sources.library_path() != before


def test_without_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler --flag")
    ended = command.lockstep("build-native", cwd=cache)
    assert ended.returncode == 1
    assert "no C++ compiler" in ended.stderr
    assert "no no-such-compiler" in ended.stderr
    assert "CXX=" in ended.stderr
    assert not sources.library_path().exists()


def test_a_compiler_that_fails(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it said is shown, and nothing is left."""
    script = cache / "compiler"
    script.write_text(
        "#!/bin/sh\ntest $1 = --version && echo one 1.0 && exit\necho broken >&2\nexit 4"
    )
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(ResourceError) as caught:
        build(print)
    assert caught.value.found == "broken"
    assert list(sources.library_path().parent.glob("*.so")) == []


def test_a_library_that_cannot_be_loaded_is_removed(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = cache / "compiler"
    script.write_text(
        '#!/bin/sh\nwhile test $# -gt 0; do test "$1" = -o && echo nothing > "$2"; shift; done'
    )
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(ResourceError, match="cannot be loaded"):
        build(print)
    assert not sources.library_path().exists()


def test_the_command_line_has_no_shell(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "_version_of", lambda command: 'odd "name" \\ $(id)')
    line = arguments(["g++"], cache / "out")
    assert '-DLOCKSTEP_COMPILER="odd name  $(id)"' in line
    assert [word for word in line if word.endswith(".cpp")]
    assert not any("ninja" in word for word in line)


@pytest.mark.long
def test_it_is_built(cache: Path) -> None:
    try:
        compiler()
    except ResourceError as error:
        pytest.skip(error.what)
    ended = command.lockstep("build-native", cwd=cache)
    assert ended.returncode == 0, ended.stderr
    path = Path(ended.stdout.strip())
    assert path == sources.library_path()
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_the_sources_are_beside_the_package() -> None:
    """A wheel has whatever lies in the package's folder."""
    names = {path.name for path in sources.source_files()}
    assert names >= {"module.cpp", "kernel_list.cpp", "step_tail.cpp", "step_tail.h"}
    package = Path(sources.__file__).parent
    assert all(path.parent == package for path in sources.source_files())
    assert all(len(path.read_text().splitlines()) <= 450 for path in sources.source_files())
