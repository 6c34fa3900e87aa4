"""Torch patches: everything of torch that is replaced or set behind its back, and why.

    keep_to_one_thread       torch.set_num_threads does nothing but take 1: forks of a process that
                             has computed on several threads wait for ever for threads that they do
                             not have, and how many there are is the job's to say.
    hand_over_storages       UntypedStorage._new_using_fd_cpu and the pickling of storages, in a
                             loader process: torch's own make named files, which stay for ever where
                             the process is killed.
    mark_stepped             Optimizer._opt_called is set: a worker that owns no block never steps
                             its optimizer, and torch would warn that its schedule is ahead.

Each is called where the docstring of its caller says. Nothing else changes torch.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def keep_to_one_thread() -> None:
    """Let nobody but `numerics.configure` ask for more threads, in this process and its forks.

    Called in the forkserver before the task is loaded.
    """
    import torch

    def set_num_threads(nthreads: int) -> None:
        if nthreads == 1:
            torch._C.set_num_threads(1)

    torch.set_num_threads = set_num_threads


def hand_over_storages(
    new_storage: Callable[[int], torch.UntypedStorage],
    reduce_storage: Callable[[torch.UntypedStorage], Any],
) -> None:
    """Make shared storages by `new_storage`, and pickle storages by `reduce_storage`.

    Called first in a loader process. Torch's `default_collate` makes its batches in shared memory
    there.
    """
    import torch

    torch.UntypedStorage._new_using_fd_cpu = staticmethod(new_storage)  # type: ignore[assignment, method-assign]
    ForkingPickler.register(torch.UntypedStorage, reduce_storage)


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer look as if it had been stepped. Called before its schedule is stepped."""
    optimizer._opt_called = True  # type: ignore[attr-defined]
