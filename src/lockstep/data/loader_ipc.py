"""Loader IPC: loader processes hand tensors to their worker in anonymous shared memory.

For each tensor torch makes a file in /dev/shm and unlinks it at once, and Python passes descriptors
on at a socket in the folder for temporary files. A process that is killed, as all of a job may be
at any moment, leaves both for ever. So tensors lie in memfds here, which go over a socket pair.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import mmap
import os
import queue
import socket
import sys
import threading
import weakref
from dataclasses import dataclass
from multiprocessing.context import ForkContext
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef, rebuild_storage_fd, reduce_storage

from lockstep.system.torch_patches import hand_over_storages

NAME = "lockstep-batch"
Waiting = queue.SimpleQueue[torch.UntypedStorage]
_receivers: dict[int, socket.socket] = {}
"""In a worker: by its own number, the end at which a loader process's descriptors come."""


class TensorChannel:
    """Socket pairs from loader processes to the worker, which makes this before it forks them."""

    def __init__(self, loaders: int) -> None:
        self._pairs = [socket.socketpair() for _ in range(loaders)]
        _receivers.update({receiver.fileno(): receiver for receiver, _ in self._pairs})

    def begin(self, loader: int) -> None:
        """In a loader process: share tensors in this way from here on."""
        receiver, sender = self._pairs.pop(loader)
        self.close()
        receiver_fd, waiting = receiver.fileno(), Waiting()
        receiver.close()
        threading.Thread(target=_send, args=(sender, waiting), daemon=True).start()
        hand_over_storages(_new_storage, functools.partial(_reduce, receiver_fd, waiting, {}))

    def forked(self) -> None:
        """In the worker, once they are forked: an end that has no other end tells of a death."""
        for _, sender in self._pairs:
            sender.close()

    def close(self) -> None:
        """Let go of everything."""
        for receiver, sender in self._pairs:
            _receivers.pop(receiver.fileno(), None)
            receiver.close()
            sender.close()
        self._pairs = []


@dataclass(frozen=True)
class _Passed:
    """Stands for a descriptor in a pickle; they come in the order in which they were pickled."""

    receiver_fd: int

    def detach(self) -> int:
        """The descriptor, which is the caller's to close."""
        said, fds, _, _ = socket.recv_fds(
            _receivers[self.receiver_fd], 1, 1, socket.MSG_CMSG_CLOEXEC
        )
        if not said:
            raise ConnectionResetError("a loader process has ended")
        return fds[0]


def _new_storage(nbytes: int) -> torch.UntypedStorage:
    """A storage that another process can map by its descriptor."""
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, max(nbytes, 1))  # a shortage is an error here, not a SIGBUS later
        storage: torch.UntypedStorage = torch.UntypedStorage._new_shared_fd_cpu(fd, nbytes)  # type: ignore[attr-defined]
        return storage
    finally:
        os.close(fd)  # the storage has one of its own


def _reduce(
    receiver_fd: int,
    waiting: Waiting,
    copies: dict[StorageWeakRef, torch.UntypedStorage],
    storage: torch.UntypedStorage,
) -> Any:
    """How a storage is pickled. Two tensors that share one share it in the worker, too."""
    nbytes = storage.nbytes()
    if not nbytes:
        return reduce_storage(storage)
    for each in [each for each in copies if each.expired()]:
        del copies[each]
    shared = storage
    if not storage.is_shared():
        known = StorageWeakRef(storage)
        if known not in copies:
            copies[known] = _new_storage(nbytes).copy_(storage, False)
        shared = copies[known]
    waiting.put(shared)
    return rebuild_storage_fd, (torch.UntypedStorage, _Passed(receiver_fd), nbytes)


def _send(end: socket.socket, waiting: Waiting) -> None:
    """Send descriptors as the worker takes them, while the loader goes on; until it is gone."""
    with end, contextlib.suppress(ConnectionError):
        while True:
            storage = waiting.get()  # kept: the descriptor is its
            fd, _ = storage._share_fd_cpu_()
            socket.send_fds(end, [b"f"], [fd])


class MemfdContext(ForkContext):
    """A context for a `DataLoader`. Every queue of it has one process that reads."""

    def __init__(self) -> None:
        self.processes: list[BaseProcess] = []
        """Those made so far. A `DataLoader` says so of its own only when it has made all."""

    def Process(self, *args: Any, **options: Any) -> BaseProcess:  # type: ignore[override]
        process = ForkContext.Process(*args, **options)
        self.processes.append(process)
        return process

    def Lock(self) -> Lock:  # type: ignore[override]
        return Lock()

    def BoundedSemaphore(self, value: int = 1) -> Unbounded:  # type: ignore[override]
        return Unbounded()

    def Event(self) -> Flag:  # type: ignore[override]
        return Flag()

    def Queue(self, maxsize: int = 0) -> Queue[Any]:
        return _Queue(maxsize, ctx=self)


class _Queue(Queue):  # type: ignore[type-arg]  # not to be subscripted when run
    """A queue that loses nothing: a process that cannot send what it has put there ends, and is
    missed. Without this whoever waits for it would do so for ever."""

    @staticmethod
    def _on_queue_feeder_error(error: Exception, obj: object) -> None:
        print(f"lockstep: a loader cannot hand over a batch: {error}", file=sys.stderr, flush=True)
        os._exit(1)


class Lock:
    """One process at a time has it, of those that are forked from the one that makes it. A process
    that dies lets go of it. Threads of one process do not shut each other out."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("lockstep-lock", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        """Wait until it can be had; of those that may not wait, nobody else wants it."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN)

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Unbounded:
    """In the place of the semaphore that limits how much is in a queue: it never does."""

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        return True

    def release(self) -> None: ...


class Flag:
    """Set once, and seen by all processes that are forked from the one that makes it."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 1)

    def set(self) -> None:
        self._map[0] = 1

    def is_set(self) -> bool:
        return bool(self._map[0])
