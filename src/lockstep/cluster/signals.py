"""Signals that end what stays in the foreground: SIGINT, SIGTERM and SIGHUP."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


@contextlib.contextmanager
def stop_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first signal; a second one raises `KeyboardInterrupt`.

    A SIGHUP that is ignored, as under nohup, stays ignored. To be used in the main thread.
    """
    before: dict[int, Any] = {}

    def signalled(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.default_int_handler)
        stop()

    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN:
            before[each] = signal.signal(each, signalled)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
