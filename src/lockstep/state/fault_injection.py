"""Scripted faults, for tests: a worker harms itself at a given step and phase.

A run takes them as its job's `faults`. Each fires once, and leaves a mark in the control segment
first, so that a test can tell that it did.
"""

from __future__ import annotations

import fcntl
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lockstep.job.faults import Fault
from lockstep.system.processes import parent_of

if TYPE_CHECKING:
    from lockstep.state.control_segment import ControlSegment


LOCKS = 1 << 40
"""Where the faults' record locks lie in the control segment's file: past the shards' claims."""
SLOW_SECONDS = 0.05
"""How much longer a slowed worker takes for each shard."""


class FaultInjector:
    """A worker's view of the script."""

    def __init__(
        self, script: Sequence[Mapping[str, Any]], worker_id: int, control: ControlSegment
    ) -> None:
        faults = [Fault(**item) for item in script]
        self._own = [
            (number, fault)
            for number, fault in enumerate(faults)
            if fault.worker_id in (worker_id, -1)
        ]
        self._fired, self._fd = control.fired, control.segment.fd
        self.slow_down = 0.0

    def __bool__(self) -> bool:
        return bool(self._own)

    def at(self, phase: str, step: int, shard: int | None = None) -> Fault | None:
        """Strike, if the script says so. A fault that flips a bit is left to the caller."""
        if self.slow_down and phase == "forward":
            time.sleep(self.slow_down)
        for number, fault in self._own:
            if fault.phase != phase or fault.step != step:
                continue
            if fault.shard is not None and fault.shard != shard:
                continue
            if not self._claim(number, fault):
                continue
            if fault.kind == "flip":
                return fault
            self._strike(fault)
        return None

    def _claim(self, number: int, fault: Fault) -> bool:
        """Mark a fault as fired; of several workers that are there at once, one gets it."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX, 1, LOCKS + number)
        try:
            if self._fired[number] and not fault.repeat:
                return False
            self._fired[number] = min(255, int(self._fired[number]) + 1)
            return True
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, LOCKS + number)

    def _strike(self, fault: Fault) -> None:
        match fault.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                signal.signal(signal.SIGSEGV, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(3)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "loop":
                while True:
                    time.sleep(0.05)
            case "host":
                os.kill(parent_of(os.getppid()), signal.SIGKILL)
                signal.pause()  # the forkserver dies with its parent, and this worker with it
            case "slow":
                self.slow_down = SLOW_SECONDS
