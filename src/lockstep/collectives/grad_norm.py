"""Gradient clipping by global norm, to the bits of `torch.nn.utils.clip_grad_norm_`.

The summed gradient is put into shared memory; the norm of each whole tensor is taken by one worker,
and then the norm of the norms by each. So neither kernel sees a boundary that moves with the number
of workers, and both see what the plain function would have given them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch.utils._foreach_utils import _group_tensors_by_device_and_dtype

from lockstep.collectives.gradient_presence import GradientPresence
from lockstep.state.control_segment import RING
from lockstep.state.shared_state import SharedState


class GradNormClipper:
    """One worker's part in limiting the norm."""

    def __init__(self, shared: SharedState, most: float) -> None:
        assert shared.total is not None
        self.shared, self.most, self.reduced = shared, most, shared.total.grads
        self._orders: dict[tuple[int, ...], tuple[list[int], torch.dtype]] = {}

    def scale(
        self,
        step: int,
        presence: GradientPresence,
        own_params: Sequence[int],
        meet: Callable[[int], None],
    ) -> torch.Tensor:
        """The factor that the summed gradient is to be multiplied by, at most 1.

        `own_params` are those whose norms this worker takes; `meet` returns when all norms of the
        step have been taken.
        """
        control = self.shared.control
        for index in own_params:
            if any(presence.of(index)):
                norm = torch.linalg.vector_norm(self.reduced[index], 2.0)
                control.norms[index] = norm.item()
        meet(step)
        there = [i for i in range(len(self.shared.params)) if any(presence.of(i))]
        order, dtype = self._order(tuple(there))
        parts = torch.from_numpy(control.norms[order]).to(dtype)
        total = torch.linalg.vector_norm(parts, 2.0) if there else torch.zeros((), dtype=dtype)
        control.total_norms[step % RING] = total.item()
        return torch.clamp(self.most / (total + 1e-6), max=1.0)

    def _order(self, there: tuple[int, ...]) -> tuple[list[int], torch.dtype]:
        """In which order and type `clip_grad_norm_` takes the norm of these tensors' norms."""
        if there not in self._orders:
            tensors: list[torch.Tensor | None] = [self.shared.params[i].detach() for i in there]
            groups = _group_tensors_by_device_and_dtype([tensors], with_indices=True)
            order = [there[i] for _, indices in groups.values() for i in indices]
            types = {self.shared.params[i].dtype for i in there} or {torch.float32}
            self._orders[there] = (order, functools.reduce(torch.promote_types, types))
        return self._orders[there]
