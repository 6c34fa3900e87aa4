"""What loader processes hand over their batches by."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

from lockstep.data.loader_ipc import MemfdContext


class Unsendable:
    """As a tensor for whose memory there is no file descriptor left."""

    def __reduce__(self) -> Any:
        raise RuntimeError("could not duplicate a shared memory file descriptor")


def put(queue: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    queue.put(Unsendable())
    multiprocessing.Event().wait(60)


def test_a_process_that_cannot_send_what_it_has_put_ends() -> None:
    """Else whoever waits for it would wait for ever: the queue forgets what it could not send."""
    queue = MemfdContext().Queue()
    process = multiprocessing.get_context("fork").Process(target=put, args=(queue,))
    process.start()
    process.join(30)
    assert process.exitcode == 1
    queue.close()
