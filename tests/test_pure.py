"""Units that need no process: arithmetic, files, messages and memory."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lockstep import layout as layouts
from lockstep import memory, seeds
from lockstep.base import Base, BasePart, steps_between
from lockstep.channel import INLINE, Channel, Closed
from lockstep.checkpoint import (
    MANIFEST,
    MODEL,
    REST,
    list_checkpoints,
    non_finite_tensors,
    open_checkpoint,
    write_checkpoint,
)
from lockstep.control import Control, ControlShape
from lockstep.data import FetchTimes, Order, Rows, wants_loaders
from lockstep.embeddings import Node
from lockstep.errors import KINDS, IntegrityError, LockstepError, ResourceError
from lockstep.errors import from_message as error_from
from lockstep.errors import to_message as message_of
from lockstep.fingerprint import fingerprint, tensor_digests
from lockstep.gradients import CHUNK, Reducer, combine_buffers, depth, tree
from lockstep.layout import (
    ALIGN,
    BLOCK,
    GROUP,
    SPARSE_BLOCKS,
    Block,
    Entry,
    Layout,
    Range,
    cut_blocks,
    group_blocks,
    merge_ranges,
    own_blocks,
)
from lockstep.ledger import Ledger, StepRecord, read_ledger
from lockstep.memory import Segment
from lockstep.placing import contiguous_stride, dense_stride
from lockstep.probing import Kind, may_cut
from lockstep.sampling import Sampling, home_shards
from tests import reference

# Sampling.

samplings = st.builds(
    Sampling,
    samples=st.integers(1, 400),
    batch_size=st.integers(1, 90),
    shards=st.integers(1, 20),
    seed=st.integers(0, 2**63),
)


@given(samplings, st.integers(0, 3))
def test_every_sample_once_per_data_epoch(sampling: Sampling, data_epoch: int) -> None:
    order = Order(sampling)
    first = data_epoch * sampling.steps_per_epoch
    steps = range(first, first + sampling.steps_per_epoch)
    seen = [i for s in steps for v in range(sampling.shards) for i in order.indices(s, v).tolist()]
    assert sorted(seen) == list(range(sampling.samples))
    assert seen == reference.order(sampling.seed, data_epoch, sampling.samples)
    assert {sampling.data_epoch(step) for step in steps} == {data_epoch}
    assert [step for step in steps if sampling.ends_epoch(step)] == [steps[-1]]


@given(samplings, st.integers(0, 2000))
def test_shards_partition_the_batch(sampling: Sampling, step: int) -> None:
    start, stop = sampling.batch_span(step)
    spans = [sampling.shard_span(step, shard) for shard in range(sampling.shards)]
    assert [span[0] for span in spans] == [start, *(span[1] for span in spans[:-1])]
    assert spans[-1][1] == stop
    sizes = [last - first for first, last in spans]
    assert sum(sizes) == sampling.batch_samples(step) == stop - start
    assert sampling.weights(step) == tuple(size / (stop - start) for size in sizes)
    assert sampling.active(step) == tuple(shard for shard, size in enumerate(sizes) if size)
    assert max(sizes) - min(sizes) <= 1
    assert 0 < stop - start <= sampling.batch_size


@given(samplings, st.lists(st.integers(0, 60), max_size=5))
def test_order_does_not_depend_on_what_was_asked_before(
    sampling: Sampling, steps: list[int]
) -> None:
    order = Order(sampling)
    for step in steps:
        assert order.indices(step, 0).tolist() == Order(sampling).indices(step, 0).tolist()


@given(st.integers(1, 64), st.data())
def test_home_shards_partition_the_shards(shards: int, data: st.DataObject) -> None:
    workers = data.draw(st.integers(1, shards))
    parts = [home_shards(shards, workers, rank) for rank in range(workers)]
    assert [shard for part in parts for shard in part] == list(range(shards))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# Seeds.


def test_seeds_are_what_they_have_always_been() -> None:
    """A change here changes the bits of every run that there is."""
    assert seeds.derive(0, "order", 0) == 3471081512423777433
    assert seeds.derive(3, "shard", 12, 5) == 2912888587245357034
    assert seeds.derive(3, "sample", -1, 7) == 6966365985986415199


@given(st.integers(0, 2**64), st.lists(st.integers(-1, 2**40), max_size=3))
def test_seeds_are_63_bits_and_documented(seed: int, numbers: list[int]) -> None:
    value = seeds.derive(seed, "shard", *numbers)
    assert 0 <= value < 2**63
    assert value == reference.derive(seed, "shard", *numbers)


def test_seeds_of_near_numbers_differ() -> None:
    found = {seeds.derive(0, "shard", step, shard) for step in range(50) for shard in range(50)}
    assert len(found) == 2500
    assert seeds.derive(0, "shard", 1, 11) != seeds.derive(0, "shard", 11, 1)


# Blocks.

block_sizes = st.lists(
    st.integers(0, 3000) | st.integers(BLOCK - 2, BLOCK + 2) | st.integers(0, 3_000_000), max_size=8
)


@given(block_sizes, st.data())
def test_blocks_partition_each_parameter(sizes: list[int], data: st.DataObject) -> None:
    cuttable = data.draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    blocks = cut_blocks(sizes, cuttable)
    assert [block.param for block in blocks] == sorted(block.param for block in blocks)
    for index, (size, may) in enumerate(zip(sizes, cuttable, strict=True)):
        mine = [block for block in blocks if block.param == index]
        edges = [block.start for block in mine] + [size]
        assert edges[0] == 0
        assert [block.stop for block in mine] == edges[1:]
        assert all(block.start % 64 == 0 for block in mine)
        assert all(block.whole == (len(mine) == 1) for block in mine)
        assert may or len(mine) == 1
        assert all(block.size >= BLOCK for block in mine[:-1])


@given(st.integers(1, 300), st.integers(1, 200_000))
def test_sparse_tables_are_cut_between_rows_into_few_blocks(width: int, rows: int) -> None:
    size = width * rows
    *table, _ = cut_blocks([size, 8], [True, True], {0: width}, {0})
    assert 1 <= len(table) <= SPARSE_BLOCKS
    assert all(block.start % width == 0 == block.start % 64 for block in table)
    assert sum(block.size for block in table) == size


@given(block_sizes, st.integers(1, 12))
def test_owners_share_evenly(sizes: list[int], workers: int) -> None:
    blocks = cut_blocks(sizes, [True] * len(sizes))
    runs = own_blocks(blocks, workers)
    assert len(runs) == workers
    assert [number for run in runs for number in run] == list(range(len(blocks)))
    loads = [sum(blocks[number].size for number in run) for run in runs]
    largest = max((block.size for block in blocks), default=0)
    assert max(loads) <= sum(sizes) / workers + largest


# The tree.


def stride_doubling(present: Sequence[bool]) -> Node | None:
    """Pairwise summation as it is done in place: at stride s, slot i takes slot i + s."""
    slots: list[Node | None] = [index if has else None for index, has in enumerate(present)]
    stride = 1
    while stride < len(slots):
        for left in range(0, len(slots) - stride, 2 * stride):
            first, second = slots[left], slots[left + stride]
            slots[left] = (
                (first, second)
                if first is not None and second is not None
                else (second if first is None else first)
            )
        stride *= 2
    return slots[0]


masks = st.lists(st.booleans(), min_size=1, max_size=40).map(tuple)


@given(masks)
def test_tree_is_stride_doubling(present: tuple[bool, ...]) -> None:
    assert tree(present) == stride_doubling(present)


def test_tree_of_six() -> None:
    assert tree((True,) * 6) == (((0, 1), (2, 3)), (4, 5))
    assert tree((True, False, True, True, False, False)) == (0, (2, 3))
    assert tree((False, False)) is None


@given(masks.filter(any))
def test_tree_is_balanced(present: tuple[bool, ...]) -> None:
    node = tree(present)
    assert node is not None
    assert depth(node) <= math.ceil(math.log2(len(present))) if len(present) > 1 else True


@settings(max_examples=40)
@given(
    st.lists(st.booleans(), min_size=1, max_size=13).map(tuple),
    st.sampled_from([1, 3, 64, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77]),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_reducer_sums_along_the_tree(
    present: tuple[bool, ...], size: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(size)
    leaves = [torch.randn(size, generator=generator).to(dtype) for _ in present]
    wanted = reference.pairwise(
        [leaf if has else None for leaf, has in zip(leaves, present, strict=True)]
    )
    out = torch.full((size,), 7.0, dtype=dtype)
    Reducer(cast(Any, SimpleNamespace(slots=leaves))).sum(present, leaves, out)
    assert torch.equal(out, torch.full_like(out, 7.0) if wanted is None else wanted)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9).filter(any), st.integers(0, 99))
def test_buffers_combine_as_documented(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = [count / sum(counts) for count in counts]
    for made in (
        torch.randn(5, 3, generator=generator),
        torch.full((4,), -torch.inf),
        torch.tensor(0.1, dtype=torch.float64),
        torch.randint(-9, 9, (7,), generator=generator),
        torch.rand(6, generator=generator) < 0.5,
    ):
        slots = [made.clone() for _ in counts]
        if made.ndim and not torch.isinf(made.double()).any():
            slots = [slot[torch.randperm(len(slot), generator=generator)] for slot in slots]
        committed = torch.zeros_like(made)
        combine_buffers(committed, slots, weights)
        present = [slot if weight else None for slot, weight in zip(slots, weights, strict=True)]
        assert torch.equal(committed, reference.combined(present, weights))
        if made.ndim == 0 or torch.isinf(made.double()).any():
            assert torch.equal(committed, made)  # a constant stays what it is


# Ranges and groups.


@st.composite
def disjoint_ranges(draw: st.DrawFn) -> list[Range]:
    """Ranges as the layout has them: some touch, some have padding or more between them."""
    ranges, cursor = [], 0
    for _ in range(draw(st.integers(0, 12))):
        gap = draw(st.sampled_from(["touch", "align", "apart"]))
        if gap != "touch":
            cursor = math.ceil(cursor / ALIGN) * ALIGN + (gap == "apart") * 3 * ALIGN
        nbytes = draw(st.integers(1, 1000))
        ranges.append(Range(offset=cursor, nbytes=nbytes))
        cursor += nbytes
    return draw(st.permutations(ranges))


def bytes_of(ranges: Sequence[Range]) -> set[int]:
    return {at for item in ranges for at in range(item.offset, item.offset + item.nbytes)}


@given(disjoint_ranges())
def test_merged_ranges_cover_the_same_bytes(ranges: list[Range]) -> None:
    merged = merge_ranges(ranges)
    assert merge_ranges(merged) == merged
    ends = [item.offset + item.nbytes for item in merged]
    assert all(end < later.offset for end, later in zip(ends, merged[1:], strict=False))
    covered, needed = bytes_of(merged), bytes_of(ranges)
    assert needed <= covered
    ends_of_needed = {item.offset + item.nbytes for item in ranges}
    for at in covered - needed:  # only padding, up to the next boundary
        end = max(end for end in ends_of_needed if end <= at)
        assert at < math.ceil(end / ALIGN) * ALIGN


@given(st.lists(st.integers(0, GROUP + 5), min_size=1, max_size=20))
def test_groups_are_runs_of_bounded_size(sizes: list[int]) -> None:
    blocks = [Block(param=i, start=0, stop=size, whole=True) for i, size in enumerate(sizes)]
    groups = group_blocks(blocks, range(len(blocks)))
    assert [number for group in groups for number in group] == list(range(len(blocks)))
    for group in groups:
        assert len(group) == 1 or sum(sizes[number] for number in group) <= GROUP


def test_the_base_is_copied_part_by_part_and_put_back() -> None:
    shape = ControlShape(shards=1, seats=1, params=1)
    control = Control(Segment.create("control", shape.nbytes()), shape)
    state, kept = Segment.create("state", 8192), Segment.create("base", 8192)
    base = Base(control, state, kept)
    first, second = bytes(range(256)) * 32, bytes(range(255, -1, -1)) * 32
    state.map[:8192] = first
    assert bytes(base.take(3)) == first
    part = BasePart(state, kept, [Range(offset=256, nbytes=400), Range(offset=1024, nbytes=1)])
    state.map[:8192] = second
    part.refresh()
    base.put_back()
    assert control.base_step == 3
    mixed = bytearray(first)
    mixed[256:656], mixed[1024:1025] = second[256:656], second[1024:1025]
    assert state.map[:8192] == mixed
    base.close()
    del part
    control.close()
    state.close()
    kept.close()


def test_the_base_is_as_young_as_its_cost_allows() -> None:
    assert steps_between(10 << 20, 2, steps_per_second=0.0) == 1
    assert steps_between(10 << 20, 2, steps_per_second=1.0) == 1, "long steps: after each"
    assert steps_between(1 << 10, 2, steps_per_second=1000.0) == 50
    large = steps_between(8 << 30, 1, steps_per_second=10.0)
    assert steps_between(8 << 30, 4, steps_per_second=10.0) == pytest.approx(large / 4, abs=1)


# The ledger.


def write_ledger(path: Path, steps: int = 3) -> list[bytes]:
    ledger = Ledger(path)
    ledger.begin("job", "state")
    for step in range(steps):
        units = {"layer.weight": f"{step:032x}", "norm/é": "ff" * 16}
        norm = 0.5 if step == 1 else None
        record = StepRecord(
            step=step, data_epoch=0, samples=26, loss=1 / (step + 3), units=units, norm=norm
        )
        ledger.commit(record)
    ledger.end(steps, "final")
    ledger.close()
    return path.read_bytes().splitlines(keepends=True)


def test_ledger_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = write_ledger(path)
    found = list(read_ledger(path))
    assert [json.loads(line) for line in lines] == [line.content for line in found]
    assert [line.end for line in found] == list(np.cumsum([len(line) for line in lines]))
    assert float.fromhex(found[1].content["loss"]) == 1 / 3
    assert found[-1].content["end"] == 3


@pytest.mark.parametrize("mask", [1, 0x20, 0x80, 0xFF])
def test_ledger_names_the_line_with_an_altered_byte(tmp_path: Path, mask: int) -> None:
    """Every byte of every line; 0x20 makes other letters, 0x80 makes bytes that are not UTF-8."""
    path = tmp_path / "ledger.jsonl"
    lines = write_ledger(path)
    whole = b"".join(lines)
    places = [number for number, line in enumerate(lines, start=1) for _ in line]
    for at, number in enumerate(places):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :])
        with pytest.raises(IntegrityError, match=rf"line {number}\b"):
            list(read_ledger(path))


def test_ledger_names_the_line_that_was_moved(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    a, b, c, d, e = write_ledger(path)
    altered = {3: [a, b, d, c, e], 2: [a, c, d, e], 4: [a, b, c, c, d, e], 1: [b, c, d, e]}
    for number, lines in altered.items():
        path.write_bytes(b"".join(lines))
        with pytest.raises(IntegrityError, match=rf"line {number}\b"):
            list(read_ledger(path))


def test_ledger_names_the_step(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = write_ledger(path)
    lines[2] = lines[2].replace(b"26", b"62")
    path.write_bytes(b"".join(lines))
    with pytest.raises(IntegrityError, match=r"line 3 .*\(step 1\)"):
        list(read_ledger(path))


def test_torn_ledger(tmp_path: Path) -> None:
    """Cut at every byte: what is whole before the cut is read, or the torn line is named."""
    path = tmp_path / "ledger.jsonl"
    lines = write_ledger(path)
    whole = b"".join(lines)
    ends = [int(end) for end in np.cumsum([len(line) for line in lines])]
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        intact = sum(end <= cut for end in ends)
        assert len(list(read_ledger(path, torn_tail=True))) == intact
        if cut not in (0, *ends):
            with pytest.raises(IntegrityError, match=rf"line {intact + 1}\b"):
                list(read_ledger(path))


def test_torn_tail_does_not_excuse_an_altered_line(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    lines = write_ledger(path)
    path.write_bytes(b"".join(lines[:2]) + lines[2].replace(b"26", b"62") + lines[3][:20])
    with pytest.raises(IntegrityError, match="line 3"):
        list(read_ledger(path, torn_tail=True))


def test_ledger_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    lines = write_ledger(first)
    second.write_bytes(b"".join(lines[:2]))
    ledger = Ledger(second, list(read_ledger(second))[-1].hash)
    for line in read_ledger(first):
        if line.content.get("step", 0) >= 1 or "end" in line.content:
            ledger._append(line.body)
    ledger.close()
    assert second.read_bytes() == first.read_bytes()


# Checkpoints.

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
        offset = space.take(nbytes)
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


def test_who_digests_what() -> None:
    """A parameter and its optimizer's state are its owner's; everything else is everybody's, and
    what nobody digests for all is in no unit."""
    kinds = {
        "a": "param", "b": "param", "a/momentum": "optim", "a.b/step": "optim", "frozen": "param",
        "a.b": "param", "mean": "buffer", "residual/0/a": "residual",
    }  # fmt: skip
    entries = tuple(
        Entry(
            name=name, kind=cast(Any, kind), dtype="float32", shape=(2048,), stride=(1,),
            offset=number * 8192, nbytes=8192,
        )
        for number, (name, kind) in enumerate(kinds.items())
    )  # fmt: skip
    audit = Layout(
        entries=entries, blocks=(), trainable=("a", "b", "a.b"), state_bytes=65536, slots_bytes=0,
        exported=(),
    ).audit()  # fmt: skip
    seen: dict[str, bool] = {}
    for step in range(0, 64 * audit.every, audit.every):
        apart, others = audit.split(step, {0, 1})
        assert sorted(apart | others) == list(range(len(audit.units(step))))
        seen |= {unit.name.partition("[")[0]: True for unit in apart.values()}
        seen |= {unit.name.partition("[")[0]: False for unit in others.values()}
        assert audit.split(step, ()) == ({}, dict(enumerate(audit.units(step))))
    assert seen == {
        "a": True, "b": True, "a/momentum": True, "a.b/step": False, "frozen": False, "a.b": False,
        "mean": False,
    }  # fmt: skip


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
    path, layout, state = checkpoint
    first = layout.entries[0]
    other = Entry(**{**vars(first), "shape": (3, 4, 5, 5)})
    fitting = Layout(**{**vars(layout), "entries": (other, *layout.entries[1:])})
    segment = Segment.create("state", len(state))
    try:
        with pytest.raises(IntegrityError, match=r"tensor (weight|tied)"):
            open_checkpoint(path).load_into(fitting, segment)
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


@given(st.permutations(range(4)), st.lists(st.integers(1, 3), min_size=4, max_size=4))
def test_dense_strides_are_kept(axes: list[int], shape: list[int]) -> None:
    """Any permutation of a row-major tensor addresses each of its elements once."""
    tensor = torch.zeros(shape).permute(axes)
    stride = dense_stride(tensor)
    flat = torch.arange(tensor.numel()).as_strided(tensor.shape, stride)
    assert sorted(flat.flatten().tolist()) == list(range(tensor.numel()))
    used = [
        (own, kept)
        for own, kept, n in zip(tensor.stride(), stride, tensor.shape, strict=True)
        if n > 1
    ]
    assert all(own == kept for own, kept in used)


def test_strides_with_gaps_become_row_major() -> None:
    assert dense_stride(torch.zeros(4, 6)[:, ::2]) == (3, 1)
    assert dense_stride(torch.zeros(3).expand(4, 3)) == (3, 1)
    assert contiguous_stride((2, 0, 3)) == (3, 3, 1)


# Optimizers.


@pytest.mark.parametrize(
    ("kind", "options", "cut"),
    [
        ("SGD", {"momentum": 0.9}, True),
        ("SGD", {"fused": True}, True),
        ("Adam", {}, True),
        ("AdamW", {"fused": True}, True),
        ("Adagrad", {}, True),
        ("RMSprop", {}, True),
        ("Adafactor", {}, False),
        ("Muon", {}, False),
        ("SparseAdam", {}, True),
    ],
)
def test_which_optimizers_may_cut_a_tensor(kind: str, options: dict[str, Any], cut: bool) -> None:
    weight = nn.Parameter(torch.zeros(3, 4))
    optimizer: torch.optim.Optimizer = getattr(torch.optim, kind)([weight], lr=0.1, **options)
    groups = [dict(group) for group in optimizer.param_groups]
    sparse = kind == "SparseAdam"
    assert may_cut(optimizer, Kind(group=0, dtype=torch.float32, sparse=sparse)) is cut
    assert [dict(group) for group in optimizer.param_groups] == groups
    assert optimizer.param_groups[0]["params"] == [weight]


# Messages between processes.


@pytest.fixture
def ends() -> Any:
    left, right = Channel.pair()
    yield left, right
    left.close()
    right.close()


EMPTY = len(json.dumps({"text": ""}))


@pytest.mark.parametrize(
    "size", [0, 1, INLINE - EMPTY - 1, INLINE - EMPTY, INLINE - EMPTY + 1, 5_000_000]
)
def test_messages_of_any_length(ends: tuple[Channel, Channel], size: int) -> None:
    left, right = ends
    message = {"text": "x" * size}
    left.send(message)
    assert right.receive(1) == (message, [])


@given(
    st.dictionaries(
        st.text(),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    )
)
def test_messages_of_any_content(message: dict[str, Any]) -> None:
    left, right = Channel.pair()
    try:
        left.send(message)
        assert right.receive(1) == (message, [])
    finally:
        left.close()
        right.close()


@pytest.mark.parametrize("size", [10, 2 * INLINE])
def test_descriptors_arrive_in_order(ends: tuple[Channel, Channel], size: int) -> None:
    left, right = ends
    pipes = [os.pipe() for _ in range(3)]
    left.send({"text": "x" * size}, [write for _, write in pipes])
    message, fds = right.receive(1)
    assert len(message["text"]) == size
    assert len(fds) == 3
    for number, fd in enumerate(fds):
        assert not os.get_inheritable(fd)
        os.write(fd, bytes([number]))
        os.close(fd)
    for number, (read, write) in enumerate(pipes):
        assert os.read(read, 9) == bytes([number])
        os.close(read)
        os.close(write)


def test_messages_keep_their_boundaries(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    for number in range(20):
        left.send({"number": number, "text": "x" * (number * 5000)})
    assert [right.receive(1)[0]["number"] for _ in range(20)] == list(range(20))
    assert not right.ready()


def test_a_closed_channel_says_so(ends: tuple[Channel, Channel]) -> None:
    left, right = ends
    left.send({"last": True})
    left.close()
    assert right.receive(1)[0] == {"last": True}
    with pytest.raises(Closed):
        right.receive(1)
    for size in (1, 2 * INLINE):
        with pytest.raises(Closed):
            right.send({"text": "x" * size})


def test_a_silent_channel_times_out(ends: tuple[Channel, Channel]) -> None:
    with pytest.raises(TimeoutError):
        ends[1].receive(0.01)


# Errors.


@pytest.mark.parametrize("kind", KINDS.values())
def test_errors_cross_processes(kind: type[LockstepError]) -> None:
    error = kind("what", expected="this", found="that", fix="do so")
    crossed = error_from(json.loads(json.dumps(message_of(error))))
    for found in (crossed, pickle.loads(pickle.dumps(error))):
        assert type(found) is kind
        assert str(found) == str(error)
        assert vars(found) == vars(error)


def test_error_message_has_only_what_is_known() -> None:
    assert str(LockstepError("what")) == "what"
    whole = str(LockstepError("what", expected="this", found="that", fix="do so"))
    assert whole == "what\n  expected: this\n  found:    that\n  next:     do so"


def test_unknown_errors_are_still_errors() -> None:
    message = {**message_of(LockstepError("what")), "kind": "FromTheFuture"}
    assert type(error_from(message)) is LockstepError


def test_every_error_is_listed() -> None:
    def below(kind: type[LockstepError]) -> set[type[LockstepError]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    assert set(KINDS.values()) == below(LockstepError)


# Memory.


def test_segment_holds_what_is_written() -> None:
    segment = Segment.create("state", 10_000)
    try:
        assert len(segment) == 10_000
        assert segment.map[:10_000] == bytes(10_000)
        segment.map[9_999:10_000] = b"x"
        other = Segment(os.dup(segment.fd), 10_000)
        assert other.map[9_999:10_000] == b"x"
        other.close()
    finally:
        segment.close()


def test_an_empty_segment_can_be_mapped() -> None:
    Segment.create("slots", 0).close()


def test_a_segment_may_be_closed_under_a_view() -> None:
    segment = Segment.create("state", 64)
    view = np.frombuffer(segment.map, np.uint8)
    segment.close()
    assert int(view.sum()) == 0


def test_a_segment_larger_than_the_memory_is_refused() -> None:
    nbytes = 2 * memory.available_bytes() + 2**40
    with pytest.raises(ResourceError, match="not enough memory for the slots segment") as caught:
        Segment.create("slots", nbytes)
    assert f"{nbytes / 2**20:,.0f} MiB" in caught.value.expected
    assert "available" in caught.value.found


def test_a_shortage_at_allocation_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixture that counts descriptors sees that none stays open."""

    def none_left(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", none_left)
    with pytest.raises(ResourceError, match="state segment"):
        Segment.create("state", 4096)


# Fetching.


def test_batches_fetched_together_are_those_fetched_alone_and_aligned() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = Rows((torch.randn(50, 7, generator=generator), torch.arange(50)))
    wanted = [np.array([3, 1, 4]), np.array([15]), np.arange(20, 33)]
    together = rows.several(wanted)
    for indices, batch in zip(wanted, together, strict=True):
        alone = rows(0, indices)
        for mine, theirs in zip(batch, alone, strict=True):
            assert torch.equal(mine, theirs)
            assert mine.data_ptr() % 64 == 0


def test_large_batches_are_fetched_one_by_one() -> None:
    rows = Rows((torch.zeros(4, 1 << 16),))
    assert rows.ahead(8) == 1
    assert rows.ahead(1) > 1


def test_one_slow_fetch_does_not_move_loading_to_another_process() -> None:
    times = FetchTimes(each=[(0.2, 0.01), *[(0.0002, 0.0002)] * 7])
    assert not wants_loaders(times, compute_seconds=0.1, spare_cores=0)[0]
    waiting = FetchTimes(each=[(0.02, 0.001)] * 8)
    assert wants_loaders(waiting, compute_seconds=0.1, spare_cores=0)[0]
