"""The plain state dict, joined from slices and cut into them again."""

from __future__ import annotations

import numpy as np

from lockstep.planning.memory_layout import Allocator, Entry, JoinedTensor, Layout, Piece
from lockstep.state.exported_tensors import exported_tensors

WIDTH = 5


def layout_of(shapes: dict[str, tuple[int, ...]], joined: tuple[JoinedTensor, ...]) -> Layout:
    space, entries = Allocator(), []
    for name, shape in shapes.items():
        nbytes = 4 * int(np.prod(shape))
        stride = tuple(int(np.prod(shape[at + 1 :])) for at in range(len(shape)))
        entries.append(
            Entry(
                name=name, kind="param", dtype="float32", shape=shape, stride=stride,
                offset=space.allocate(nbytes), nbytes=nbytes,
            )
        )  # fmt: skip
    return Layout(
        entries=tuple(entries), blocks=(), trainable=tuple(shapes), state_bytes=space.used,
        slots_bytes=0, exported=(("bias", "bias"),), joined=joined,
    )  # fmt: skip


def packed(slices: tuple[int, int]) -> JoinedTensor:
    """Two thirds of each slice belong to queries and keys, as in an attention."""
    pieces = [
        Piece(entry=f"slices.{index}", start=part * size, stop=(part + 1) * size)
        for part in range(2)
        for index, size in enumerate(slices)
    ]
    return JoinedTensor(key="in_proj_weight", dim=0, pieces=tuple(pieces))


def test_a_tensor_is_joined_from_pieces_and_written_back() -> None:
    shapes = {"slices.0": (6, WIDTH), "bias": (2,), "slices.1": (4, WIDTH)}
    layout = layout_of(shapes, (packed((3, 2)),))
    state = bytearray(np.arange(layout.state_bytes // 4, dtype=np.float32).tobytes())
    bias, weight = exported_tensors(layout, memoryview(state))
    assert (bias.key, weight.key) == ("bias", "in_proj_weight")
    assert weight.shape == (10, WIDTH)
    assert weight.entries == {"slices.0", "slices.1"}
    whole = weight.read().view(np.float32)
    first = np.frombuffer(state, np.float32, 6 * WIDTH).reshape(6, WIDTH)
    assert (whole[:3] == first[:3]).all()
    assert (whole[5:8] == first[3:]).all()
    before = bytes(state)
    for each in (bias, weight):
        each.write(bytes(each.read().nbytes))
    assert bytes(state) != before
    bias.write(np.frombuffer(before, np.float32, 2, layout.entry("bias").offset).tobytes())
    weight.write(whole.tobytes())
    assert bytes(state) == before


def test_columns_are_joined_along_the_second_dimension() -> None:
    pieces = tuple(Piece(entry=f"slices.{i}", start=0, stop=2 - i) for i in range(2))
    joined = JoinedTensor(key="weight", dim=1, pieces=pieces)
    layout = layout_of({"slices.0": (3, 2), "slices.1": (3, 1), "bias": (2,)}, (joined,))
    assert Layout.from_message(layout.to_message()) == layout
    state = bytearray(layout.state_bytes)
    weight = list(exported_tensors(layout, memoryview(state)))[1]
    weight.write(np.arange(9, dtype=np.float32).tobytes())
    found = weight.read().view(np.float32)
    assert (found == np.arange(9).reshape(3, 3)).all()
    second = np.frombuffer(state, np.float32, 3, layout.entry("slices.1").offset)
    assert (second == [2, 5, 8]).all()
