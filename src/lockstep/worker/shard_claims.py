"""Shard claims: which worker computes which shard, when there are more shards than workers.

A worker computes its own shards first and then takes over what others have not begun, so a slow
worker holds the step up only with the shard that it is on. A claim is a record lock on one byte of
the control segment's file: the kernel grants it to one process at a time, and lets go of it when
that process dies. Who computes a shard changes no bit.
"""

from __future__ import annotations

import fcntl

from lockstep.state.control_segment import ControlSegment


class ShardClaims:
    """One worker's claims."""

    def __init__(self, control: ControlSegment) -> None:
        self._fd, self._done = control.segment.fd, control.shard_done

    def claim(self, shard: int, step: int) -> bool:
        """Claim a shard that nobody has computed or is computing; to be released afterwards."""
        if self._done[shard] == step:
            return False
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
        except OSError:
            return False  # somebody is at it
        if self._done[shard] == step:
            self.release(shard)
            return False
        return True

    def release(self, shard: int) -> None:
        """Let go of a claim."""
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, shard)
