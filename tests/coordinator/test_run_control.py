"""Requests to a running job: which are refused, and that whoever asked hears why."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockstep.coordinator.run_control import SOCKET, Request, RunControl, Taken, ask
from lockstep.errors import JobError, RunFolderError
from lockstep.system.unix_socket import short_path


@pytest.fixture
def control(tmp_path: Path) -> Iterator[RunControl]:
    """Requests of a run in `tmp_path` that can have three workers, taken all the time."""
    ended = threading.Event()
    with RunControl() as made:
        made.open(tmp_path, max_workers=3)

        def answer() -> None:
            while not ended.wait(0.01):
                made._answer_callers()

        thread = threading.Thread(target=answer)
        thread.start()
        yield made
        ended.set()
        thread.join()


@pytest.mark.parametrize("workers", [0, -1, 4, 10**6])
def test_numbers_of_workers_that_cannot_be(
    control: RunControl, workers: int, tmp_path: Path
) -> None:
    with pytest.raises(JobError, match=f"cannot have {workers} workers") as caught:
        ask(tmp_path, "scale", workers)
    assert caught.value.expected == "1 to 3, its max_workers"
    with pytest.raises(JobError, match=f"cannot have {workers} workers"):
        control.add("scale", workers)
    assert control.take() == []


def test_what_can_be_is_answered(control: RunControl, tmp_path: Path) -> None:
    assert ask(tmp_path, "scale", 3) == Taken(max_workers=3)
    ask(tmp_path, "stop")
    assert control.take() == [Request(name="scale", number=3), Request(name="stop")]


def test_unknown_requests_and_folders(control: RunControl, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="unknown request 'dance'"):
        ask(tmp_path, "dance")
    with pytest.raises(RunFolderError, match="nothing runs in"):
        ask(tmp_path / "none", "stop")


def test_before_the_run_has_begun(tmp_path: Path) -> None:
    with RunControl() as control, pytest.raises(JobError, match="cannot have 0 workers"):
        control.add("scale", 0)


@pytest.mark.parametrize(
    "sent",
    [b"", b"\0", b"\xff\xff\xff\xff", b'{"request": "stop"}\n', b"\0\0\0\x01\xc1"],
    ids=["nothing", "a-beginning", "a-length", "json", "no-message"],
)
def test_what_is_no_request_does_no_harm(control: RunControl, sent: bytes, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as caller, short_path(tmp_path / SOCKET) as place:
        caller.connect(place)
        caller.sendall(sent)
        caller.shutdown(socket.SHUT_WR)
        while caller.recv(4096):
            pass
    assert ask(tmp_path, "pause").max_workers == 3
    assert control.take() == [Request(name="pause")]
