"""Forks that answer a question: what they say comes back, and none is waited for without end."""

from __future__ import annotations

import os
import time

from lockstep.worker.fork_setup import ask_fork


def test_a_fork_answers_from_a_process_of_its_own() -> None:
    assert int(ask_fork(lambda: str(os.getpid()).encode(), 20)) != os.getpid()


def test_a_fork_that_takes_too_long_is_ended() -> None:
    def sleep() -> bytes:
        time.sleep(60)
        return b"too late"

    begun = time.monotonic()
    assert ask_fork(sleep, 1) == b""
    assert time.monotonic() - begun < 20


def test_a_fork_that_fails_answers_nothing() -> None:
    assert ask_fork(lambda: bytes(-1), 20) == b""
