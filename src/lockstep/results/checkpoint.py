"""Checkpoint: the committed state as safetensors with digests, written atomically."""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import safetensors
from blake3 import blake3

from lockstep.errors import IntegrityError, ResourceError
from lockstep.planning.memory_layout import Layout
from lockstep.state.exported_tensors import ExportedTensor, entry_tensor, exported_tensors
from lockstep.state.fingerprint import fingerprint, tensor_digests
from lockstep.system.json_files import file_digest, write_json
from lockstep.system.shared_memory import Segment

MODEL, REST, MANIFEST = "model.safetensors", "state.safetensors", "manifest.json"


def write_model(path: Path, layout: Layout, state: bytes | memoryview) -> None:
    """Write the module's state dict; `safetensors.torch.load_file` and the module read it."""
    _write_tensors(path, list(exported_tensors(layout, memoryview(state))))


def _write_tensors(path: Path, named: list[ExportedTensor]) -> None:
    with _joined(path.parent, named) as arrays:
        _serialize(path, named, arrays)
    _sync(path)


JOINED_IN_MEMORY = 256 << 20
"""Bytes: up to so many are joined from slices in memory, more in a file without a name."""


@contextlib.contextmanager
def _joined(folder: Path, named: list[ExportedTensor]) -> Iterator[dict[str, npt.NDArray[Any]]]:
    """The tensors by key, each in one piece. Who writes them may have memory for slices alone."""
    sizes = {each.key: each.joined_bytes for each in named}
    if sum(sizes.values()) <= JOINED_IN_MEMORY:
        yield {each.key: each.read() for each in named}
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(sum(sizes.values()))
        room, start = memoryview(mmap.mmap(file.fileno(), 0)), 0
        arrays = {}
        for each in named:
            size = sizes[each.key]
            arrays[each.key] = each.read(room[start : start + size] if size else None)
            start += size
        yield arrays


def _serialize(
    path: Path, named: list[ExportedTensor], arrays: dict[str, npt.NDArray[Any]]
) -> None:
    tensors = {
        each.key: safetensors.TensorSpec(
            dtype=each.dtype,
            shape=list(each.shape),
            data_ptr=arrays[each.key].ctypes.data,
            data_len=arrays[each.key].nbytes,
        )
        for each in named
    }
    try:
        safetensors.serialize_file(tensors, str(path), metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # nothing but the disk can be at fault
        raise OSError(str(error)) from error


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_checkpoint(
    folder: Path, step: int, layout: Layout, state: bytes | memoryview, extra: dict[str, Any]
) -> Path:
    """Write the state after `step` committed steps under `folder`, atomically.

    Raises:
        ResourceError: the disk is full or the folder cannot be written; older checkpoints stay.
    """
    final = folder / f"step-{step:08d}"
    partial = folder / f".partial-{step:08d}-{os.getpid()}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        folder.mkdir(exist_ok=True)  # without parents: a run folder that is gone stays so
        partial.mkdir()
        write_model(partial / MODEL, layout, state)
        _write_tensors(partial / REST, _rest(layout, memoryview(state)))
        digests = tensor_digests(layout, state)
        manifest = {
            "step": step,
            "fingerprint": fingerprint(digests),
            "tensors": digests,
            "files": {name: file_digest(partial / name) for name in (MODEL, REST)},
            **extra,
        }
        manifest["digest"] = _manifest_digest(manifest)
        write_json(partial / MANIFEST, manifest)
        if final.exists():
            if _is_good(final, manifest["digest"]):  # written before the run was resumed at it
                shutil.rmtree(partial)
                return final
            shutil.rmtree(final)
        partial.rename(final)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ResourceError(
            f"the checkpoint of step {step} could not be written: {error}",
            expected=f"free space under {folder}",
            fix="free disk space or choose another run folder; earlier checkpoints are kept",
        ) from error
    return final


def _rest(layout: Layout, state: memoryview) -> list[ExportedTensor]:
    """What the state dict does not have, each entry under its own name."""
    exported = {name for each in exported_tensors(layout, state) for name in each.entries}
    rest = [entry for entry in layout.entries if entry.name not in exported]
    return [entry_tensor(entry.name, entry, state) for entry in rest]


def _is_good(path: Path, digest: str) -> bool:
    """Whether `path` is an intact checkpoint whose manifest has this digest."""
    try:
        return _manifest_digest(open_checkpoint(path).manifest) == digest
    except IntegrityError:
        return False


class SharedLock:
    """Shared lock: kept on a file by whoever reads it, until nobody refers to the lock."""

    def __init__(self, path: Path) -> None:
        """Take the lock.

        Raises:
            FileNotFoundError: the file is not there, or has just been removed.
        """
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._fd, fcntl.LOCK_SH)
        if not os.path.samestat(os.fstat(self._fd), path.stat()):
            raise FileNotFoundError(f"{path} has just been replaced")

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # it could not be opened
            os.close(self._fd)


def _nobody_reads(fd: int) -> bool:
    """Whether no reader has a lock on this file; it is locked against new ones then."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def remove_checkpoint(path: Path) -> bool:
    """Remove a checkpoint, unless somebody reads it; whether it is gone."""
    try:
        fd = os.open(path / MANIFEST, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # torn: nobody reads it
        shutil.rmtree(path, ignore_errors=True)
        return True
    try:
        if not _nobody_reads(fd):
            return False
        gone = path.with_name(f".partial-{path.name}")  # at once, so that nobody finds half of it
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Checkpoint: one on disk, whose files have the digests of its manifest."""

    path: Path
    step: int
    manifest: dict[str, Any]
    lock: SharedLock
    """As long as somebody has this, a run that goes on does not remove the files."""

    def load_into(self, layout: Layout, state: Segment) -> None:
        """Write the tensors into the state segment, before any worker runs.

        Raises:
            IntegrityError: they are not those of the task's model and optimizer, and nothing was
                written; or the state does not have the recorded digests afterwards.
        """
        for place, data in self._fitting(layout, memoryview(state.map)):
            place.write(data)
        found = tensor_digests(layout, state)
        wrong = [n for n, d in self.manifest["tensors"].items() if found.get(n) != d]
        if wrong:
            raise IntegrityError(
                f"{self.path}: the restored state differs from the recorded one",
                expected="the digests in its manifest",
                found=f"others for {', '.join(wrong[:5])}",
            )

    def _fitting(self, layout: Layout, state: memoryview) -> list[tuple[ExportedTensor, bytes]]:
        """The bytes of each tensor with where they go; the tensors are those of the layout, no more
        and no fewer."""
        places = {
            MODEL: {each.key: each for each in exported_tensors(layout, state)},
            REST: {each.key: each for each in _rest(layout, state)},
        }
        found = []
        for file in (MODEL, REST):
            for key, tensor in _read_tensors(self.path / file):
                place = places[file].get(key)
                if place is None or list(place.shape) != tensor["shape"]:
                    raise self._unfit(
                        key,
                        expected=f"shape {list(place.shape)}" if place else "no such tensor",
                        found=f"shape {tensor['shape']}",
                    )
                found.append((place, tensor["data"]))
        names = {entry.name for entry in layout.entries}
        missing = names - self.manifest["tensors"].keys()
        if missing:
            raise self._unfit(min(missing), expected="it among the tensors", found="no such tensor")
        return found

    def _unfit(self, key: str, *, expected: str, found: str) -> IntegrityError:
        return IntegrityError(
            f"{self.path}: tensor {key} does not fit the task's model and optimizer",
            expected=expected,
            found=found,
            fix="use the code that wrote the checkpoint",
        )


def _read_tensors(path: Path) -> list[tuple[str, dict[str, Any]]]:
    tensors: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(path.read_bytes())
    return tensors


def open_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint's files against its manifest. It is not removed while it is in use.

    Raises:
        IntegrityError: a file is missing, truncated or altered; it is named.
    """
    try:
        lock = SharedLock(path / MANIFEST)
        manifest = json.loads((path / MANIFEST).read_text())
        recorded = manifest.pop("digest")
        if recorded != _manifest_digest(manifest):
            raise IntegrityError(
                f"{path / MANIFEST} is not what was written",
                expected=f"digest {_manifest_digest(manifest)[:16]}…",
                found=f"digest {str(recorded)[:16]}…",
                fix="it was truncated or altered; an earlier checkpoint can be used",
            )
        for name, expected in manifest["files"].items():
            _check_file(path / name, expected, manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"{path / MANIFEST} is not a checkpoint's manifest: {error}",
            fix="an earlier checkpoint can be used",
        ) from error
    return Checkpoint(path=path, step=manifest["step"], manifest=manifest, lock=lock)


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return blake3(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_file(path: Path, expected: str, manifest: dict[str, Any]) -> None:
    if not path.is_file():
        raise IntegrityError(f"{path} is missing", fix="an earlier checkpoint can be used")
    if (found := file_digest(path)) != expected:
        raise IntegrityError(
            f"{path} is not what was written",
            expected=f"digest {expected[:16]}…",
            found=f"digest {found[:16]}…{_name_tensors(path, manifest)}",
            fix="it was truncated or altered; an earlier checkpoint can be used",
        )


def _name_tensors(path: Path, manifest: dict[str, Any]) -> str:
    """The tensors of an altered file that differ, as far as it can still be read."""
    try:
        tensors = _read_tensors(path)
    except safetensors.SafetensorError as error:
        return f" ({error})"
    wrong = []
    for name, tensor in tensors:
        if name not in manifest["tensors"]:
            continue  # another name of a tied tensor
        shape = tuple(tensor["shape"])
        dtype = _DTYPES.get(tensor["dtype"], tensor["dtype"])
        for kind in ("param", "buffer", "optim", "flag"):
            digest = blake3(f"{kind}\0{name}\0{dtype}\0{shape}\0".encode())
            digest.update(tensor["data"])
            if digest.hexdigest() == manifest["tensors"].get(name):
                break
        else:
            wrong.append(name)
    return f" (tensor {', '.join(wrong[:5])})" if wrong else ""


_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


def check_model_file(path: Path, layout: Layout, state: bytes | memoryview) -> None:
    """Compare a file that `write_model` wrote with the state that it should hold.

    Raises:
        IntegrityError: it is missing or differs; the tensors are named.
    """
    if not path.is_file():
        raise IntegrityError(f"{path} is missing", fix="it is in the last checkpoint too")
    with tempfile.TemporaryDirectory() as folder:
        wanted = Path(folder) / MODEL
        write_model(wanted, layout, state)
        expected, found = file_digest(wanted), file_digest(path)
        if expected == found:
            return
        try:
            there = {name: bytes(tensor["data"]) for name, tensor in _read_tensors(path)}
        except safetensors.SafetensorError as error:
            named = str(error)
        else:
            should = {name: bytes(tensor["data"]) for name, tensor in _read_tensors(wanted)}
            names = sorted(should.keys() | there.keys())
            wrong = [name for name in names if should.get(name) != there.get(name)]
            named = f"tensor {', '.join(wrong[:5])}" if wrong else "all tensors are the same"
    raise IntegrityError(
        f"{path} is not what the run computed",
        expected=f"digest {expected[:16]}…",
        found=f"digest {found[:16]}… ({named})",
        fix="it was truncated or altered; the last checkpoint holds the model too",
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """Paths of the checkpoints under a run's `checkpoints` folder, newest first."""
    return sorted(folder.glob("step-" + "[0-9]" * 8), reverse=True)


def step_of(path: Path) -> int:
    """After how many steps the checkpoint of this path was written."""
    return int(path.name.removeprefix("step-"))


def open_checkpoints(folder: Path) -> list[Checkpoint]:
    """The checkpoints under a run's `checkpoints` folder, newest first, each checked. One that a
    run has removed meanwhile is left out.

    Raises:
        IntegrityError: one is damaged.
    """
    found = []
    for path in list_checkpoints(folder):
        try:
            found.append(open_checkpoint(path))
        except IntegrityError:
            if path.exists():
                raise
    return found


def remove_partial(folder: Path) -> None:
    """Remove incomplete checkpoints of a killed coordinator. Called under the run's lock."""
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)
