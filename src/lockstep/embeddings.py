"""Large dense embeddings, without their zeros.

The gradient of a dense `nn.Embedding` is as large as its table and nearly all zeros. Autograd
fills, and a slot would be filled, with all of them at each step. Here the module is asked for the
sparse form, and only the touched rows of the slot are written: those of this step with their sums,
those of the slot's last step with zeros. The slot then holds the dense gradient, bit for bit, since
the rows are summed by the very kernel that makes the dense one.

Where that would not be so (the module is called twice in a forward pass, or its table is used
elsewhere as well) the shard is computed again in the dense form, and the module is left dense.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from lockstep.state import Slot

LARGE = 1 << 20
"""Elements: tables from this size on are treated so."""


class Redo(Exception):
    """A table turned out to need the dense form: compute the shard again."""


class SparseTables:
    """The tables of a model that are run in the sparse form. One per worker."""

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter]) -> None:
        self._modules: dict[int, nn.Embedding] = {}
        self._calls: dict[int, int] = {}
        self._touched: dict[tuple[int, int], torch.Tensor] = {}
        """`(index, address of the slot's gradient)` to the rows of it that are not zero."""
        owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(module)
        for index, parameter in enumerate(params):
            holders = owners.get(id(parameter), [])
            if parameter.numel() >= LARGE and len(holders) == 1 and _suits(holders[0]):
                module = holders[0]
                assert isinstance(module, nn.Embedding)
                module.sparse = True
                self._modules[index] = module
                module.register_forward_pre_hook(self._counter(index))

    def __contains__(self, index: int) -> bool:
        return index in self._modules

    def begin(self) -> None:
        """A shard begins."""
        self._calls.clear()

    def store(self, index: int, gradient: torch.Tensor, home: torch.Tensor) -> None:
        """Make `home` the dense form of a gradient.

        Raises:
            Redo: its bits would not be those of the dense form.
        """
        if not gradient.is_sparse or self._calls.get(index) != 1:
            self.give_up(index)
            raise Redo
        key = (index, home.data_ptr())
        if key in self._touched:
            home.index_fill_(0, self._touched[key], 0)
        else:
            home.zero_()
        rows, inverse = torch.unique(gradient._indices()[0], return_inverse=True)
        sums = torch.ops.aten.embedding_dense_backward(
            gradient._values(), inverse, len(rows), -1, False
        )
        home.index_copy_(0, rows, sums)
        self._touched[key] = rows

    def give_up(self, index: int) -> None:
        """Run a table in the dense form from now on."""
        self._modules.pop(index).sparse = False

    def forget(self, slot: Slot | None = None) -> None:
        """Somebody else has written to a slot, or may have to all: fill it whole once more."""
        if slot is None:
            self._touched.clear()
            return
        for index in self._modules:
            self._touched.pop((index, slot.grads[index].data_ptr()), None)

    def _counter(self, index: int):  # type: ignore[no-untyped-def]  # a hook, as nn.Module wants it
        def count(_: nn.Module, __: object) -> None:
            self._calls[index] = self._calls.get(index, 0) + 1

        return count


def _suits(module: nn.Module) -> bool:
    """Whether a module is a plain embedding whose sparse gradient has the same rows."""
    return (
        type(module) is nn.Embedding
        and not module.sparse
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and module.weight.is_contiguous()
        and not module.weight._backward_hooks
    )
