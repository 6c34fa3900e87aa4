"""Data that the master sends: what is read is what was written, and the bits are the same."""

from __future__ import annotations

import collections
import os
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Subset, TensorDataset

import lockstep
from lockstep.data.dataset_shipping import read_sets, write_sets
from lockstep.data.fetching import make_fetch
from lockstep.data.sample_codec import DTYPES, pack_sample, unpack_sample
from lockstep.errors import DataError, IntegrityError, LockstepError, StoppedError
from lockstep.net.blob_transfer import BlobServer
from tests.support.agents_on_loopback import Agents, Listed
from tests.support.harmed_runs import assert_same, events, yard
from tests.support.multi_host_runs import PACED, TASK, WAIT, Live, Site, ended_well, site
from tests.support.named_tasks import Blobs
from tests.support.paced_task import PACE
from tests.zoo.vectors import SAMPLES

__all__ = ["site", "yard"]  # fixtures


def again(sample: Any) -> Any:
    return unpack_sample(memoryview(b"".join(pack_sample(sample))))


def same(one: Any, other: Any) -> bool:
    """Whether two samples are the same to the bit, the type and the stride."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        meta = one.dtype == other.dtype and one.shape == other.shape
        return meta and one.stride() == other.stride() and bits(one) == bits(other)
    if isinstance(one, np.ndarray | np.generic):
        meta = one.dtype == other.dtype and one.shape == other.shape
        return bool(meta and one.strides == other.strides and one.tobytes() == other.tobytes())
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(same, one.values(), other.values()))
    return repr(one) == repr(other)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary()
    | st.sampled_from([np.float32(0.1), np.int64(3), np.str_("x"), np.datetime64("2026-01-01")])
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(TREES)
def test_trees(sample: Any) -> None:
    assert same(again(sample), sample)


@pytest.mark.parametrize("name", DTYPES)
def test_tensors_of_every_type(name: str) -> None:
    flat = (
        torch.randint(0, 256, (24 * 16,), dtype=torch.uint8) if name != "bool" else torch.ones(24)
    )
    tensor = flat.to(torch.bool) if name == "bool" else flat.view(DTYPES[name])
    for shaped in (tensor[:24].reshape(2, 3, 4), tensor[0], tensor[:0]):
        assert same(again(shaped.clone()), shaped.clone())


FOUR = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5)


@pytest.mark.parametrize(
    "sample",
    [
        FOUR.to(memory_format=torch.channels_last),
        FOUR.permute(3, 1, 0, 2),
        np.asfortranarray(FOUR.numpy()),
        FOUR.numpy().transpose(2, 0, 3, 1),
        np.arange(3, dtype=">i4"),
        np.array(["a", "bcd"]),
        np.array(5.0),
    ],
    ids=str,
)
def test_strides_and_orders_of_bytes(sample: Any) -> None:
    assert same(again((1, sample)), (1, sample))


def test_views_become_dense() -> None:
    for view in (FOUR[:, 1], FOUR[..., ::2], torch.ones(1).expand(3), FOUR[0].mT):
        assert torch.equal(again(view), view)
        assert again(view).data_ptr() % 64 == 0


Point = collections.namedtuple("Point", "x y")


class Whole(int):
    pass


@pytest.mark.parametrize(
    ("sample", "found"),
    [
        (object(), "builtins.object"),
        (Point(1, 2), "Point"),
        (Whole(3), "Whole"),
        ([1, {"a": (2, {3})}], "set"),
        (nn.Parameter(torch.ones(2)), "not plain"),
        (torch.ones(2, 2).to_sparse(), "not plain"),
        (np.array([object()]), "ndarray"),
        ({(1, 2): 3}, "a key of type tuple"),
    ],
)
def test_what_a_sample_may_not_hold(sample: Any, found: str) -> None:
    with pytest.raises(DataError, match="sample 1 of the held-out set cannot be sent") as raised:
        write_sets(Listed([1]), Listed([2, sample])).close()
    assert found in raised.value.what
    assert "set data to build" in raised.value.fix


def test_where_it_is_held() -> None:
    with pytest.raises(DataError) as raised:
        pack_sample({"x": [0, (1, {2})]})
    assert "at ['x'][1][1]" in raised.value.found


# Whole sets.


def read(train: Any, held_out: Any = None) -> tuple[Any, Any]:
    segment = write_sets(train, held_out)
    try:
        return read_sets(segment.fd, segment.nbytes)
    finally:
        segment.close()


SETS = {
    "tensors": TensorDataset(torch.randn(300, 5), torch.arange(300), torch.ones(300, 0)),
    "samples": Listed([(torch.randn(3), n, f"text {n}") for n in range(300)]),
    "together": Subset(Listed([{"x": np.ones(2, np.float32) * n} for n in range(300)]), range(270)),
}


@pytest.mark.parametrize("name", SETS)
def test_batches_are_the_same(name: str) -> None:
    given, task = SETS[name], Blobs()
    train, held_out = read(given, given)
    for found in (train, held_out):
        assert len(found) == len(given)  # type: ignore[arg-type]
        assert hasattr(found, "__getitems__") == hasattr(given, "__getitems__")
        mine, other = make_fetch(task, found, 7), make_fetch(task, given, 7)
        for epoch, indices in ((0, [3]), (1, [260, 0, 7, 7]), (-1, list(range(20)))):
            assert same(drawn(mine, epoch, indices), drawn(other, epoch, indices))


def drawn(fetch: Any, epoch: int, indices: list[int]) -> tuple[Any, float]:
    """A batch, and what is drawn after it: where collate draws, it has to draw the same."""
    random.seed(1)
    return fetch(epoch, indices), random.random()


def test_there_may_be_no_held_out_set() -> None:
    train, held_out = read(Listed([1, 2]))
    assert (list(train), held_out) == ([1, 2], None)


def test_samples_are_nobody_elses() -> None:
    """A task may change what it gets; the next access gives it anew."""
    train, _ = read(Listed([torch.zeros(2)]))
    train[0].add_(1)
    assert train[0].tolist() == [0, 0]
    segment = write_sets(TensorDataset(torch.zeros(4)), None)
    (one, _), (other, _) = (read_sets(segment.fd, segment.nbytes) for _ in range(2))
    one.tensors[0].add_(1)  # type: ignore[attr-defined]
    assert other.tensors[0].tolist() == [0, 0, 0, 0]  # type: ignore[attr-defined]
    segment.close()


class Drawn(Listed):
    """Draws from one of the generators for a late sample."""

    def __init__(self, draw: Any) -> None:
        super().__init__(range(600))
        self.draw = draw

    def __getitem__(self, index: int) -> Any:
        return self.draw() if index == 300 else 0


@pytest.mark.parametrize(
    "draw", [lambda: float(torch.rand(())), random.random, lambda: float(np.random.rand())]
)
def test_sets_that_are_drawn_at_random_are_refused(draw: Any) -> None:
    with pytest.raises(DataError, match="the training set draws random numbers") as raised:
        write_sets(Drawn(draw), None)
    assert "samples 256 to 511" in raised.value.found
    assert "Task.collate" in raised.value.fix


class Short(Listed):
    def __getitems__(self, indices: list[int]) -> Any:
        return {"x": indices}


def test_sets_that_fetch_no_list_are_refused() -> None:
    with pytest.raises(DataError, match="does not give as many samples as it has"):
        write_sets(Short(range(5)), None)


@given(st.binary(min_size=1, max_size=200))
def test_bytes_that_are_no_sets(content: bytes) -> None:
    fd = os.memfd_create("lockstep-test")
    try:
        os.write(fd, content)
        with pytest.raises(DataError):
            read_sets(fd, len(content))
    finally:
        os.close(fd)


# On several hosts.

VITAL: dict[str, Any] = {"batch_size": 14, "steps": 12, "shards": 4, "threads": 1, "seed": 3}


def run(site: Site, on: Agents, task: str, **changes: Any) -> lockstep.Result:
    """Run a task whose data is on the master's host alone."""
    return lockstep.run(
        f"tests.support.agents_on_loopback:{task}", on=on, workers=1 + len(on.names),
        out=site.yard.path(), quiet=True, **{**VITAL, "data": "ship", **changes},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("task", "args"),
    [
        ("OnlyHere", {}),
        pytest.param("Described", {"kind": "one by one"}, marks=pytest.mark.long),
        pytest.param("Described", {"kind": "several"}, marks=pytest.mark.long),
    ],
)
def test_the_same_bits_as_with_data_that_is_there(
    site: Site, task: str, args: dict[str, Any]
) -> None:
    on = site.agents({"b": 1, "c": 1})
    found = run(site, on, task, args=args)
    assert_same(
        found, site.yard.undisturbed(f"tests.support.agents_on_loopback:{task}", args=args, **VITAL)
    )
    ended_well(on)


def test_data_that_is_altered_on_the_way(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    put = BlobServer.put

    def altered(self: BlobServer, hold: Any, content: memoryview) -> None:
        put(self, hold, b"!" + bytes(content[1:]))

    monkeypatch.setattr(BlobServer, "put", altered)
    on = site.agents({"b": 1})
    with pytest.raises(IntegrityError, match="host b: the data that host master has sent is not"):
        run(site, on, "OnlyHere")
    assert on.wait() == {"b": 1}


@pytest.mark.parametrize(
    ("task", "what", "found"),
    [
        ("Drawn", "the training set draws random numbers", "samples 0 to"),
        ("Changed", "sets attributes of the task", "self.fill, self.mean"),
    ],
)
def test_data_that_cannot_be_sent(site: Site, task: str, what: str, found: str) -> None:
    on = site.agents({"b": 1})
    with pytest.raises(DataError, match=what) as raised:
        run(site, on, task)
    assert found in raised.value.found
    assert not on.processes


class Striking:
    """Kills a host's agent when it asks for a piece of data."""

    def __init__(self, on: Agents, name: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.struck = False
        serve = BlobServer.serve

        def strike(store: BlobServer, peer: str, message: Any) -> None:
            if peer == name and message.piece == piece and not self.struck:
                self.struck = True
                on.signal(name)
            serve(store, peer, message)

        monkeypatch.setattr(BlobServer, "serve", strike)


LARGE = {"fill": (64 << 20) // (4 * SAMPLES)}
"""Data of 64 MiB: 16 pieces, of which 8 are under way at a time."""


def test_a_host_dies_before_the_run_while_data_is_sent(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    on = site.agents({"b": 1})
    striking = Striking(on, "b", 10, monkeypatch)
    with pytest.raises(LockstepError, match="host b"):
        run(site, on, "OnlyHere", args=LARGE)
    assert striking.struck
    ended_well(on, "b")


@pytest.mark.long
def test_a_host_dies_as_it_joins_while_data_is_sent(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on; another host gets the data and joins; the bits are the same."""
    monkeypatch.setenv(PACE, "0.004")
    on = site.agents({"b": 1})
    striking = Striking(on, "c", 0, monkeypatch)
    changes = {"steps": 900, "data": "ship"}
    live = Live(site, on, **changes)
    live.await_step(8)
    on.start("c", 1)
    live.wait_for(lambda event: striking.struck, "the death of c")
    on.start("d", 1)
    live.await_host("d")
    live.run.stop()
    with pytest.raises(StoppedError):
        live.run.result(WAIT)
    ended_well(on, "c")
    assert not events(live.folder, "host_lost")
    monkeypatch.setenv(PACE, "0")
    resumed = lockstep.resume(live.folder, on=site.agents({"x": 1}), quiet=True)
    assert_same(resumed, site.yard.undisturbed(TASK, **PACED, **changes))
