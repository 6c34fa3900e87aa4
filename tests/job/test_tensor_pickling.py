"""Tensors in a task's pickle: only what is looked at, and shared as it was."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset, random_split

import lockstep
from lockstep.job.job import Job
from lockstep.job.task_source import source_of
from lockstep.job.tensor_pickling import ALIGN, dumps


def again(value: Any) -> Any:
    return pickle.loads(dumps(value))


def test_a_slice_takes_its_own_bytes_along() -> None:
    whole = torch.arange(100_000.0).view(-1, 10)
    assert len(dumps(whole)) > 400_000
    assert len(dumps(TensorDataset(whole[:10]))) < 3_000
    halves = [whole[:5_000], whole[5_000:]]
    assert 400_000 < len(dumps(halves)) < 402_000
    for half, found in zip(halves, again(halves), strict=True):
        assert torch.equal(half, found)
    splits = random_split(TensorDataset(whole), [5_000, 5_000])
    assert len(dumps(splits)) < 500_000


def test_a_task_with_train_and_test_as_slices() -> None:
    whole = torch.zeros(10_000, 10)
    sets = [TensorDataset(whole[:100]), TensorDataset(whole[9_900:])]
    task = lockstep.from_module(
        nn.Linear(10, 1), sets[0], nn.functional.mse_loss, torch.optim.SGD, eval_dataset=sets[1]
    )
    assert len(dumps(task)) < 12_000
    payload = source_of(Job(task=task)).payload
    assert payload is not None
    assert payload.endswith(dumps(task))


def test_views_that_overlap_share_memory_afterwards() -> None:
    whole = torch.zeros(1000)
    base, part, row, other = again(
        [whole[100:300], whole[200:400], whole[100:300][::2], whole[900:]]
    )
    base[100:] = 1.0
    assert part[:100].eq(1).all()
    assert row[50:].eq(1).all()
    assert not other.any()
    assert other.untyped_storage().data_ptr() != base.untyped_storage().data_ptr()


def test_other_types_of_the_same_memory_share_it() -> None:
    value = torch.zeros(8)
    floats, words, storage = again([value, value.view(torch.int32), value.untyped_storage()])
    floats.fill_(1.0)
    assert (words == words[0]).all()
    assert words[0] != 0
    assert storage.data_ptr() == floats.data_ptr()


def test_a_module_whose_tensors_are_tied_by_storage() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    a, b = model["a"], model["b"]
    assert isinstance(a, nn.Linear)
    assert isinstance(b, nn.Linear)
    b.weight.data = a.weight.data
    model.register_buffer("row", a.bias.data[1:3])
    found = again(model)
    found["a"].weight.data.fill_(3.0)
    assert found["b"].weight.eq(3).all()
    found["a"].bias.data.fill_(4.0)
    assert found.row.eq(4).all()


class Kind(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(3.0),
        torch.zeros(0, 3),
        torch.eye(4).t()[1:],
        torch.arange(6).expand(3, 6),
        torch.ones(2, dtype=torch.bfloat16),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.ones(3, requires_grad=True),
        nn.Parameter(torch.ones(5)[2:], requires_grad=False),
        torch.arange(9.0)[3:].as_subclass(Kind),
        torch.eye(3).to_sparse(),
    ],
    ids=repr,
)
def test_all_sorts_of_tensors(value: torch.Tensor) -> None:
    found = again(OrderedDict(it=value))["it"]
    assert type(found) is type(value)
    assert (found.shape, found.dtype, found.layout) == (value.shape, value.dtype, value.layout)
    assert found.requires_grad == value.requires_grad
    assert torch.equal(found.detach().to_dense(), value.detach().to_dense())
    if value.layout is torch.strided:
        assert found.stride() == value.stride()


def test_attributes_of_a_tensor_and_arrays_are_kept() -> None:
    value: Any = torch.arange(100.0)[50:]
    value.note = "kept"
    tensor, array = again((value, np.arange(3)))
    assert tensor.note == "kept"
    assert tensor.tolist() == value.tolist()
    assert array.tolist() == [0, 1, 2]


def test_memory_stays_as_aligned_as_it_was() -> None:
    whole = torch.arange(1000.0)
    for start in (0, 1, 3, 17, 500):
        found = again(whole[start : start + 9])
        assert found.data_ptr() % ALIGN == whole[start:].data_ptr() % ALIGN


def test_tensors_that_are_made_for_the_pickle_alone() -> None:
    """A generator's state is one: it is another tensor each time it is asked for."""
    generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
    tensors = [torch.arange(631.0 * size) for size in range(1, 20)]
    found, kept = again([generators, tensors])
    for one, other in zip(generators, found, strict=True):
        assert torch.equal(torch.rand(3, generator=one), torch.rand(3, generator=other))
    for tensor, same in zip(tensors, kept, strict=True):
        assert torch.equal(tensor, same)
