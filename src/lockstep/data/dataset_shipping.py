"""Data sets as bytes: what `data: ship` sends to other hosts, and how they read it.

    the contents of each set | where they are, as JSON | the length of that, in 8 bytes

After the two sets comes what decides the order of the training set, if anything does.

Of a `TensorDataset` that is its tensors, read where they lie. Of any other set it is a record for
each sample: a tree of tuples, lists and dictionaries in JSON, then the bytes of its arrays. Nothing
is pickled, so a sample holds nothing else than arrays, numbers, texts and bytes.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from lockstep.data.order_rules import ByLength, ByWeight, OrderRule
from lockstep.data.sample_codec import Tree, pack_sample, pack_tensor, unpack_sample, unpack_tensor
from lockstep.errors import DataError
from lockstep.system.machine import check_available
from lockstep.system.seeding import generator_states
from lockstep.system.shared_memory import Segment

ALIGN = 64
"""Bytes: where torch's own tensors begin."""
CHUNK = 256
"""Samples between two looks at the generators and at the memory that is left."""
LENGTH = struct.Struct("<Q")
Sets = tuple[Dataset[Any], Dataset[Any] | None]
"""The training set and the held-out set."""


def write_sets(
    train: Dataset[Any], held_out: Dataset[Any] | None, rule: OrderRule | None = None
) -> Segment:
    """Both sets, and the order's rule, in memory that can be handed on; the caller closes it.

    Raises:
        DataError: a sample holds something else, or is drawn at random.
        ResourceError: there is not that much memory.
    """
    fd = os.memfd_create("lockstep-data", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            writer = _Writer(file)
            where = [
                writer.add_set(train, "training"),
                writer.add_set(held_out, "held-out"),
                writer.add_rule(rule),
            ]
            footer = json.dumps(where).encode()
            writer.add(footer, LENGTH.pack(len(footer)))
        os.truncate(fd, max(writer.position, mmap.PAGESIZE))  # what a segment has at least
        return Segment(fd, writer.position)
    except BaseException:
        os.close(fd)
        raise


def read_sets(fd: int, nbytes: int) -> Sets:
    """The sets that `write_sets` has written. Nobody else sees what is changed in them.

    Raises:
        DataError: the bytes are not what it writes.
    """
    with _refused_where_unreadable():
        content, (train, held_out, _) = _content_and_places(fd, nbytes)
        return _read_set(content, train), _read_set(content, held_out)


def read_rule(fd: int, nbytes: int) -> OrderRule | None:
    """What decides the order of these sets; raises as `read_sets` does."""
    with _refused_where_unreadable():
        content, (_, _, where) = _content_and_places(fd, nbytes)
        if where is None:
            return None
        numbers = np.frombuffer(content, np.float64, where["samples"], where["at"]).copy()
        return ByWeight(numbers) if where["by"] == "weights" else ByLength(numbers)


def _content_and_places(fd: int, nbytes: int) -> tuple[memoryview, tuple[Any, Any, Any]]:
    """What is in memory, and where there the sets and the rule are."""
    content = memoryview(mmap.mmap(fd, nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE))
    (size,) = LENGTH.unpack(content[-LENGTH.size :])
    train, held_out, rule = json.loads(bytes(content[-LENGTH.size - size : -LENGTH.size]))
    return content, (train, held_out, rule)


@contextlib.contextmanager
def _refused_where_unreadable() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, struct.error) as error:
        raise DataError(
            "the data that the master has sent cannot be read",
            expected="what the same version of Lockstep writes",
            found=ascii(error)[:200],
        ) from None


def _read_set(content: memoryview, where: Any) -> Any:
    if where is None:
        return None
    if "tensors" in where:
        return TensorDataset(*(unpack_tensor(tree, content[at:]) for at, tree in where["tensors"]))
    starts = np.frombuffer(content, np.int64, where["samples"] + 1, where["starts"])
    return (ShippedTogether if where["together"] else Shipped)(content, starts)


class Shipped(Dataset[Any]):
    """Samples in records; each access makes a sample anew."""

    def __init__(self, content: memoryview, starts: np.ndarray[Any, Any]) -> None:
        self._content, self._starts = content, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return unpack_sample(self._content[self._starts[index] : self._starts[index + 1]])


class ShippedTogether(Shipped):
    """Of a set that fetches several samples at once: they are then drawn for under one seed."""

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        return [self[index] for index in indices]


class _Writer:
    def __init__(self, file: Any) -> None:
        self._file, self.position = file, 0

    def add(self, *contents: bytes | memoryview) -> None:
        for content in contents:
            self._file.write(content)
            self.position += len(content)

    def _align(self) -> int:
        self.add(bytes(-self.position % ALIGN))
        return self.position

    def add_set(self, dataset: Any, name: str) -> Any:
        """Write a set; returns where it is, ready for JSON."""
        if dataset is None:
            return None
        if type(dataset) is TensorDataset:
            return {"tensors": [self._tensor(tensor, name) for tensor in dataset.tensors]}
        together, starts = hasattr(dataset, "__getitems__"), [self.position]
        for index, sample in enumerate(_samples(dataset, name, together=together)):
            if index % CHUNK == 0:
                check_available(f"the {name} set that is shipped", self.position)
            try:
                self.add(*pack_sample(sample))
            except DataError as error:
                raise _unfit(f"sample {index} of the {name} set", error) from None
            starts.append(self.position)
        if len(starts) - 1 != len(dataset):
            raise DataError(
                f"the {name} set does not give as many samples as it has",
                expected=f"{len(dataset)}, one for each index",
                found=f"{len(starts) - 1}",
                fix="have __getitems__ return a list of samples, or set data to build",
            )
        where = self._align()
        self.add(np.array(starts, np.int64).tobytes())
        return {"samples": len(starts) - 1, "starts": where, "together": together}

    def add_rule(self, rule: OrderRule | None) -> Any:
        """Write the order's rule; returns where it is, ready for JSON."""
        if rule is None:
            return None
        by = "weights" if isinstance(rule, ByWeight) else "lengths"
        numbers = rule.weights if isinstance(rule, ByWeight) else rule.lengths
        where = self._align()
        self.add(numbers.tobytes())
        return {"by": by, "samples": len(numbers), "at": where}

    def _tensor(self, tensor: torch.Tensor, name: str) -> tuple[int, Tree]:
        check_available(f"the {name} set that is shipped", tensor.nbytes)
        where = self._align()
        try:
            tree, content = pack_tensor(tensor)
        except DataError as error:
            raise _unfit(f"a tensor of the {name} set", error) from None
        self.add(content)
        return where, tree


def _samples(dataset: Any, name: str, *, together: bool) -> Iterator[Any]:
    """Every sample once.

    Raises:
        DataError: they are drawn at random, so that other data epochs have others.
    """
    for first in range(0, len(dataset), CHUNK):
        indices = list(range(first, min(first + CHUNK, len(dataset))))
        before = generator_states()
        samples = dataset.__getitems__(indices) if together else map(dataset.__getitem__, indices)
        yield from samples
        if generator_states() != before:
            raise DataError(
                f"the {name} set draws random numbers, so it cannot be sent once for all",
                expected="the same samples in every data epoch",
                found=f"draws for samples {first} to {indices[-1]}",
                fix="draw them in Task.collate, which every host calls, or set data to build",
            )


def _unfit(what: str, error: DataError) -> DataError:
    return DataError(
        f"{what} cannot be sent to other hosts: {error.what}",
        expected="tensors, NumPy arrays, numbers, texts and bytes, in tuples, lists and "
        "dictionaries with keys of text or whole numbers",
        found=error.found,
        fix="have the data set turn it into these, or set data to build",
    )
