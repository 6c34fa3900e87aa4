"""Wires that packets take a set time to pass: for networks of namespaces, as a process of its own.

    python -m benchmarks.delays 2

Each wire is two TAP devices, `near0` and `far0` and so on, in the network namespace in which this
is started; what is sent into the one comes out of the other, as late as was asked for, in its
order. It says `ready` once they are there. Each line `WIRE SECONDS SECONDS` on stdin sets the two
delays of a wire, from near to far and back, and is answered; it ends with its stdin, or its parent.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Iterable

from lockstep.system.processes import die_with_parent

TUN = "/dev/net/tun"
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_LONGEST = 65536
"""Bytes of a frame, at the most."""
_WAITING = 50_000
"""Frames that are on their way in one direction, at the most; more are lost, as on any router."""
_BURST = 64
"""Frames that are taken from one device before others have their turn."""
_NOBODY = (errno.EIO, errno.EBADFD, errno.ENOBUFS, errno.EAGAIN)
"""A device that is down, gone or full: the frame is lost."""


def missing() -> str:
    """Why there can be no such wires here; "" if there can."""
    try:
        os.close(os.open(TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"packets cannot be delayed: {error}"
    return ""


class Direction:
    """Frames on their way from one device to another."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self._target = source, target
        self.seconds = 0.0
        self._frames: deque[tuple[float, bytes]] = deque()

    def take(self) -> None:
        """Take what its source has sent. A delay that has become shorter overtakes nothing."""
        for _ in range(_BURST):
            try:
                frame = os.read(self.source, _LONGEST)
            except OSError as error:
                if error.errno not in _NOBODY:
                    raise
                return
            if len(self._frames) < _WAITING:
                due = time.monotonic() + self.seconds
                last = self._frames[-1][0] if self._frames else due
                self._frames.append((max(due, last), frame))

    def deliver(self) -> float | None:
        """Hand over what has been on its way for long enough; seconds until there is more."""
        while self._frames:
            left = self._frames[0][0] - time.monotonic()
            if left > 0:
                return left
            try:
                os.write(self._target, self._frames.popleft()[1])
            except OSError as error:
                if error.errno not in _NOBODY:
                    raise
        return None


def open_tap(name: str) -> int:
    """The descriptor of a new TAP device, which is there for as long as that is open."""
    descriptor = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    request = struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI)
    fcntl.ioctl(descriptor, _TUNSETIFF, request)
    return descriptor


def forward(wires: list[tuple[Direction, Direction]], control: int, answer: int) -> None:
    """Carry frames until `control` ends, and set delays as it says."""
    directions = {each.source: each for wire in wires for each in wire}
    unread = b""
    while True:
        waits = [left for each in directions.values() if (left := each.deliver()) is not None]
        ready, _, _ = select.select([control, *directions], [], [], min(waits, default=None))
        for source in ready:
            if source != control:
                directions[source].take()
        if control in ready:
            said = os.read(control, 4096)
            if not said:
                return
            *lines, unread = (unread + said).split(b"\n")
            for line in lines:
                _set(wires, line.split())
                os.write(answer, b"set\n")


def _set(wires: list[tuple[Direction, Direction]], words: Iterable[bytes]) -> None:
    wire, *seconds = words
    for direction, delay in zip(wires[int(wire)], seconds, strict=True):
        direction.seconds = float(delay)


def main() -> None:
    """Make so many wires, and serve them."""
    die_with_parent()
    wires = []
    for number in range(int(sys.argv[1])):
        near, far = open_tap(f"near{number}"), open_tap(f"far{number}")
        wires.append((Direction(near, far), Direction(far, near)))
    os.write(1, b"ready\n")
    forward(wires, 0, 1)


if __name__ == "__main__":
    main()
