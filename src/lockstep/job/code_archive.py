"""Code archive: a task's module or package as a tar file, for `ship_code`.

The tar file (USTAR) holds importable files, sorted by name, with fixed modes and times. The same
sources give the same bytes, and so the same digest, on every machine. A received archive is packed
again and compared, so it has no links, devices, paths outside its folder, or second copies.
"""

from __future__ import annotations

import io
import os
import sys
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path, PurePosixPath

from blake3 import blake3

from lockstep.errors import IntegrityError, JobError
from lockstep.system.folders import working_folder

MAX_FILES, MAX_SOURCE = 2000, 4 << 20
"""Limits of an archive: number of files, and bytes of all files together."""
MAX_BYTES = 8 << 20
"""Limit of an archive's size, headers included."""


@dataclass(frozen=True, kw_only=True)
class Archive:
    """Archive: the code of a task, ready to be sent."""

    task: str
    """The task's name in the archive: `module:Task`."""
    files: Mapping[str, int]
    """The size in bytes of each file, by path."""
    data: bytes

    @property
    def digest(self) -> str:
        """BLAKE3 of the bytes: 64 hexadecimal digits."""
        return blake3(self.data).hexdigest()


def pack(name: str) -> Archive:
    """Pack the code of a task (`module:Task`, `file.py:Task`), or a module.

    Of a module in a package, the whole top-level package is packed. Nothing is imported.

    Raises:
        JobError: there is no such code, or it cannot be packed.
    """
    where, colon, attribute = name.rpartition(":")
    where = where if colon else attribute
    if where.endswith(".py"):
        path = Path(where)
        found, module = {path.name: path}, path.stem
    else:
        found, module = dict(_files_of(where.partition(".")[0])), where
    files = {}
    for relative, path in sorted(found.items()):
        files[relative] = _read(path)
        _check_size(name, len(files), sum(map(len, files.values())))
    _check_names(files)
    data = _tar(files)
    return Archive(
        task=f"{module}:{attribute}" if colon else module,
        files={relative: len(content) for relative, content in files.items()},
        data=data,
    )


def unpack(data: bytes, folder: Path) -> None:
    """Write an archive's files into an existing, private, empty folder.

    The caller has compared the digest with those that are allowed.

    Raises:
        IntegrityError: it is not an archive of `pack`. Nothing is written then.
    """
    for relative, content in _entries(data).items():
        path = folder / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            file.write(content)


def _files_of(module: str) -> Iterator[tuple[str, Path]]:
    """The files of a top-level module or package, with their paths in an archive."""
    here = working_folder()
    spec = PathFinder.find_spec(module, [here, *sys.path])
    if spec is None:
        raise JobError(
            f"there is no module {module}",
            found=f"looked in {here} and the Python path",
            fix="run from the folder that holds it, or give file.py:Task",
        )
    if spec.submodule_search_locations is None:
        if not (spec.origin or "").endswith(".py"):
            raise _unusable(module, "it is not Python source", spec.origin or "compiled in")
        yield f"{module}.py", Path(str(spec.origin))
        return
    roots = list(spec.submodule_search_locations)
    if len(roots) != 1:
        raise _unusable(module, "it is in several folders", ", ".join(roots))
    for folder, folders, names in os.walk(roots[0]):
        folders[:] = [name for name in folders if name.isidentifier()]
        for linked in (Path(folder, name) for name in folders):
            if linked.is_symlink():
                raise _unusable(module, "it contains a link", str(linked))
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix == ".py" and stem.isidentifier():  # other files cannot be imported
                path = Path(folder, name)
                yield str(PurePosixPath(module, path.relative_to(roots[0]))), path


def _read(path: Path) -> bytes:
    if path.is_symlink():
        raise _unusable(path.name, "it is a link", str(path))
    try:
        with path.open("rb") as file:
            return file.read(MAX_SOURCE + 1)  # one byte more than allowed
    except OSError as error:
        raise _unusable(path.name, "it cannot be read", f"{path}: {error.strerror}") from None


def _check_size(name: str, files: int, nbytes: int) -> None:
    if files > MAX_FILES or nbytes > MAX_SOURCE:
        raise JobError(
            f"the code of {name} is too large to be shipped",
            expected=f"at most {MAX_FILES:,} files and {MAX_SOURCE:,} bytes",
            found=f"at least {files} files, {nbytes:,} bytes",
            fix="install it on every host, and have them allow it: lockstep join --allow MODULE",
        )


def _check_names(files: Mapping[str, bytes]) -> None:
    """Check that every path is importable, so that none leads outside its folder."""
    for name in files:
        *folders, last = name.split("/")
        stem, suffix = os.path.splitext(last)
        if suffix != ".py" or not all(part.isidentifier() for part in (*folders, stem)):
            raise JobError(
                f"the file {name!a} does not belong in an archive of code",
                expected="a name that can be imported, such as package/module.py",
                found=ascii(name),
                fix="rename it",
            )


def _tar(files: Mapping[str, bytes]) -> bytes:
    """The archive of these files: always the same bytes."""
    buffer = io.BytesIO()
    try:
        with tarfile.open(
            fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT, encoding="utf-8"
        ) as tar:
            for name, content in sorted(files.items()):
                info = tarfile.TarInfo(name)  # time 0, owner 0, mode 0644
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    except ValueError as error:
        raise JobError(f"a path is too long for an archive: {error}") from None
    return buffer.getvalue()


def _entries(data: bytes) -> dict[str, bytes]:
    """The files of an archive.

    Raises:
        IntegrityError: `_tar` gives other bytes for these files.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:", encoding="utf-8") as tar:
            files = {}
            for member in tar:
                if member.type != tarfile.REGTYPE or member.pax_headers or member.size > len(data):
                    raise JobError("an entry is not a plain file", found=ascii(member.name))
                reader = tar.extractfile(member)
                assert reader is not None
                files[member.name] = reader.read()
        _check_names(files)
        if len(data) <= MAX_BYTES and files and _tar(files) == data:
            return files
        found = "other bytes than these files would give"
    except (tarfile.TarError, JobError, ValueError, OSError, EOFError) as error:
        found = str(error)
    raise IntegrityError(
        "an archive of code does not have the form that Lockstep writes",
        expected="plain .py files, each once, sorted, with paths inside the folder",
        found=found,
        fix="have the master pack it again: lockstep run --ship-code",
    )


def _unusable(name: str, what: str, found: str) -> JobError:
    return JobError(
        f"{name} cannot be shipped: {what}",
        expected="a module or a package in Python source, without links",
        found=found,
        fix="install it on every host instead, and leave out ship_code",
    )
