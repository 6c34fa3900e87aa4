"""Checkpoints: what is written is read back, and what was altered is refused by name."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from lockstep.errors import IntegrityError, ResourceError
from lockstep.planning import memory_layout as layouts
from lockstep.planning.memory_layout import (
    Entry,
    Layout,
)
from lockstep.results.checkpoint import (
    MANIFEST,
    MODEL,
    REST,
    list_checkpoints,
    open_checkpoint,
    remove_checkpoint,
    write_checkpoint,
)
from lockstep.state.allocation import dense_stride
from lockstep.state.fingerprint import fingerprint, non_finite_tensors, tensor_digests
from lockstep.system.shared_memory import Segment

SHAPES: dict[str, tuple[torch.Tensor, str]] = {
    "weight": (torch.randn(4, 3, 5, 5), "param"),
    "last": (torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last), "param"),
    "half": (torch.randn(7, 3).to(torch.bfloat16), "param"),
    "float16": (torch.randn(7).half(), "param"),
    "double": (torch.randn((), dtype=torch.float64), "param"),
    "empty": (torch.empty(0), "param"),
    "transposed": (torch.randn(6, 4).t(), "param"),
    "seen": (torch.tensor(2**40), "buffer"),
    "mask": (torch.tensor([True, False, True]), "buffer"),
    "small": (torch.tensor([-5, 7], dtype=torch.int8), "buffer"),
    "weight/exp_avg": (torch.randn(4, 3, 5, 5), "optim"),
    "weight/step": (torch.tensor(12.0), "optim"),
    "lockstep.present": (torch.ones(3, dtype=torch.uint8), "flag"),
}


def made_state() -> tuple[Layout, bytes]:
    """A state with every type and stride; `tied` is another name of `weight`."""
    space, entries, state = layouts.Allocator(), [], bytearray()
    for name, (tensor, kind) in SHAPES.items():
        stride = dense_stride(tensor)
        nbytes = tensor.numel() * tensor.dtype.itemsize
        dtype = str(tensor.dtype).removeprefix("torch.")
        offset = space.allocate(nbytes)
        entries.append(
            Entry(
                name=name, kind=cast(Any, kind), dtype=dtype, shape=tuple(tensor.shape),
                stride=stride, offset=offset, nbytes=nbytes,
            )
        )  # fmt: skip
        stored = tensor.as_strided((tensor.numel(),), (1,)).contiguous().view(torch.uint8)
        state += bytes(space.used - len(state))
        state[offset : offset + nbytes] = bytes(stored.numpy().data)
    exported = [(name, name) for name, (_, kind) in SHAPES.items() if kind in ("param", "buffer")]
    layout = Layout(
        entries=tuple(entries), blocks=(), trainable=("weight",), state_bytes=space.used,
        slots_bytes=0, exported=(*exported, ("tied", "weight")),
    )  # fmt: skip
    return layout, bytes(state)


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Layout, bytes]:
    torch.manual_seed(0)
    layout, state = made_state()
    return write_checkpoint(tmp_path, 7, layout, state, {"ledger": "abc"}), layout, state


Written = tuple[Path, Layout, bytes]


def test_checkpoint_round_trip(checkpoint: Written) -> None:
    path, layout, state = checkpoint
    found = open_checkpoint(path)
    assert found.step == 7
    assert found.manifest["ledger"] == "abc"
    assert found.manifest["fingerprint"] == fingerprint(tensor_digests(layout, state))
    segment = Segment.create("state", layout.state_bytes)
    try:
        segment.map[: len(state)] = b"\xaa" * len(state)
        found.load_into(layout, segment)
        for entry in layout.entries:
            span = slice(entry.offset, entry.offset + entry.nbytes)
            assert segment.map[span] == state[span], entry.name
    finally:
        segment.close()


def test_checkpoint_is_plain_safetensors(checkpoint: Written) -> None:
    from safetensors.torch import load_file

    path, _, _ = checkpoint
    model, rest = load_file(path / MODEL), load_file(path / REST)
    for name, (tensor, kind) in SHAPES.items():
        found = (model if kind in ("param", "buffer") else rest)[name]
        assert found.dtype == tensor.dtype
        assert torch.equal(found, tensor), name
    assert torch.equal(model["tied"], model["weight"])


@pytest.mark.parametrize("name", [MODEL, REST])
def test_flipped_bits_are_refused_by_name(checkpoint: Written, name: str) -> None:
    path = checkpoint[0] / name
    whole = path.read_bytes()
    for at in range(0, len(whole), 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
        with pytest.raises(IntegrityError, match=name):
            open_checkpoint(checkpoint[0])
    path.write_bytes(whole)
    open_checkpoint(checkpoint[0])


@pytest.mark.parametrize(
    ("file", "name"),
    [
        (REST, "weight/exp_avg"),
        (MODEL, "half"),
    ],
)
def test_a_flipped_bit_names_its_tensor(checkpoint: Written, file: str, name: str) -> None:
    path = checkpoint[0] / file
    whole = path.read_bytes()
    at = whole.index(bytes(SHAPES[name][0].flatten().view(torch.uint8).numpy().data)) + 17
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    with pytest.raises(IntegrityError, match=rf"\(tensor {name}\)"):
        open_checkpoint(checkpoint[0])


@pytest.mark.parametrize("name", [MODEL, REST, MANIFEST])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused_by_name(checkpoint: Written, name: str, part: float) -> None:
    path = checkpoint[0] / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(IntegrityError, match=checkpoint[0].name):
        open_checkpoint(checkpoint[0])


@pytest.mark.parametrize("name", [MODEL, REST, MANIFEST])
def test_missing_files_are_refused_by_name(checkpoint: Written, name: str) -> None:
    (checkpoint[0] / name).unlink()
    with pytest.raises(IntegrityError, match=name):
        open_checkpoint(checkpoint[0])


def test_an_altered_manifest_is_refused(checkpoint: Written) -> None:
    """Whatever a flipped bit does to the manifest: it is refused, or says the same."""
    path = checkpoint[0]
    whole = (path / MANIFEST).read_bytes()
    true, accepted = json.loads(whole), []
    for at in range(len(whole)):
        (path / MANIFEST).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            if open_checkpoint(path).manifest != true:
                accepted.append(whole[max(0, at - 20) : at + 5])
        except IntegrityError:
            continue
    assert not accepted, f"{len(accepted)} flips go unnoticed, for instance at {accepted[0]!r}"


@pytest.mark.parametrize("content", ["[]", "7", '"text"', '{"step": 7, "files": []}', "null"])
def test_a_manifest_of_another_kind_is_refused(checkpoint: Written, content: str) -> None:
    (checkpoint[0] / MANIFEST).write_text(content)
    with pytest.raises(IntegrityError):
        open_checkpoint(checkpoint[0])


def test_checkpoints_are_listed_newest_first(tmp_path: Path) -> None:
    layout, state = made_state()
    for step in (3, 5, 8, 120):
        write_checkpoint(tmp_path, step, layout, state, {})
    (tmp_path / ".partial-00000009-1").mkdir()
    (tmp_path / "step-00000009.bak").mkdir()
    assert [path.name[-3:] for path in list_checkpoints(tmp_path)] == ["120", "008", "005", "003"]


def test_a_checkpoint_of_another_model_is_refused(checkpoint: Written) -> None:
    """And nothing of it is written: a run that begins without it has its own first state."""
    path, layout, state = checkpoint
    last = layout.entries[-1]
    other = Entry(**{**vars(last), "shape": (3, 4, 5, 5)})
    more = Entry(**{**vars(last), "name": "weight/momentum"})
    for entries in ((*layout.entries[:-1], other), (*layout.entries, more)):
        segment = Segment.create("state", len(state))
        fitting = Layout(**{**vars(layout), "entries": entries})
        try:
            with pytest.raises(IntegrityError, match="does not fit the task's model and optimizer"):
                open_checkpoint(path).load_into(fitting, segment)
            assert not any(bytes(segment.map))
        finally:
            segment.close()


def test_a_full_disk_leaves_what_was_there(
    checkpoint: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, layout, state = checkpoint

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        for step in (7, 8):
            with pytest.raises(ResourceError, match="No space left"):
                write_checkpoint(path.parent, step, layout, state, {})
    assert open_checkpoint(path).manifest["ledger"] == "abc"
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_layout_message_round_trip() -> None:
    layout, _ = made_state()
    assert Layout.from_message(json.loads(json.dumps(layout.to_message()))) == layout


def test_non_finite_tensors_are_named() -> None:
    layout, state = made_state()
    assert non_finite_tensors(layout, state) == []
    broken = bytearray(state)
    for name, bad in (("weight", np.inf), ("double", np.nan)):
        entry = next(entry for entry in layout.entries if entry.name == name)
        value = np.array(bad, entry.dtype).tobytes()
        broken[entry.offset : entry.offset + len(value)] = value
    assert non_finite_tensors(layout, bytes(broken)) == ["weight", "double"]


def test_one_that_is_read_is_not_removed(checkpoint: Written) -> None:
    path, _, _ = checkpoint
    readers = [open_checkpoint(path), open_checkpoint(path)]
    assert not remove_checkpoint(path)
    readers.pop()
    assert not remove_checkpoint(path)
    assert open_checkpoint(path).step == 7
    readers.clear()
    assert remove_checkpoint(path)
    assert list(path.parent.iterdir()) == []
    with pytest.raises(IntegrityError):
        open_checkpoint(path)


def test_a_torn_one_is_removed(checkpoint: Written) -> None:
    path, _, _ = checkpoint
    (path / MANIFEST).unlink()
    assert remove_checkpoint(path)
    assert not path.exists()


def test_none_is_written_where_the_run_folder_is_gone(checkpoint: Written) -> None:
    path, layout, state = checkpoint
    gone = path.parent / "gone"
    with pytest.raises(ResourceError):
        write_checkpoint(gone / "checkpoints", 7, layout, state, {})
    assert not gone.exists()
