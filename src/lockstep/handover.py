"""What loader processes hand over lies in memory that has no name.

For each tensor that is shared, torch makes a file in /dev/shm and unlinks it at once. A process
that is killed in between, as all of a job may be at any time, would leave the file for ever.
"""

from __future__ import annotations

import os
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch.multiprocessing.reductions import reduce_storage

NAME = "lockstep-batch"


def share_without_names() -> None:
    """Have this process, which is a loader and nothing else, share tensors in anonymous files."""
    # Torch's `default_collate` makes its batches there, in a loader.
    torch.UntypedStorage._new_using_fd_cpu = staticmethod(_new_storage)  # type: ignore[assignment, method-assign]
    ForkingPickler.register(torch.UntypedStorage, _reduce)


def _new_storage(nbytes: int) -> torch.UntypedStorage:
    """A storage that another process can map by its descriptor."""
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, max(nbytes, 1))  # a shortage is an error here, not a SIGBUS later
        storage: torch.UntypedStorage = torch.UntypedStorage._new_shared_fd_cpu(fd, nbytes)  # type: ignore[attr-defined]
        return storage
    finally:
        os.close(fd)  # the storage has one of its own


def _reduce(storage: torch.UntypedStorage) -> Any:
    """How a storage is pickled: torch's way, from memory that is shared already."""
    if storage.nbytes() and not storage.is_shared():
        storage = _new_storage(storage.nbytes()).copy_(storage, False)
    return reduce_storage(storage)
