"""Device: where a worker computes, and how its home and the host's segments give each other bytes.

One worker has one device, made after its fork. `tests/device` holds every implementation to this.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from lockstep.planning.byte_ranges import ByteRange
from lockstep.state.shared_state import SharedState

SegmentName = Literal["state", "slots"]
"""The segments of which a home has a part: a byte has the same offset in both."""


class Device(Protocol):
    """A worker's device. Its worker alone calls it, from one thread."""

    apart: bool
    """Whether homes are memory of their own. If not, `load`, `store` and `settle` do nothing."""

    moved: int
    """Bytes that `settle` has moved, in both directions."""

    def home(self, shared: SharedState) -> SharedState:
        """The worker's home: `shared`, its tensors in the memory in which this worker computes.

        Called once. Afterwards the model's parameters are the home's. The offsets are those of
        the segments. In a home that is apart, nothing has its value before it is loaded.
        """

    def load(self, segment: SegmentName, ranges: Iterable[ByteRange]) -> None:
        """Have these bytes of the home become those of the host's segment, by the next `settle`.

        Nobody writes to them, here or there, before that has returned.
        """

    def store(self, segment: SegmentName, ranges: Iterable[ByteRange]) -> None:
        """Have these bytes of the host's segment become those of the home, by the next `settle`.

        What this worker has computed before the call is what is stored.
        """

    def settle(self) -> None:
        """Return when all that was asked for has been done: others may be told of what was stored,
        and what was loaded may be computed with."""

    def place(self, batch: Any) -> Any:
        """A batch as the loss takes it: its tensors where the model's are, the same in all else."""

    def seed(self, seed: int) -> None:
        """Seed every generator that the loss may draw from: those of torch, here and on the device,
        of NumPy and of Python."""

    def autocast(self) -> AbstractContextManager[object]:
        """The context in which the loss is computed in bfloat16 where that is safe."""

    def confirm(self, step: int, shard: int) -> None:
        """Return where the shard just computed is what any other device of this profile makes of
        it.

        Raises:
            ResourceError: it may not be.
        """

    def digest(self, offset: int, nbytes: int) -> bytes:
        """The digest of a run of the home's state, as the ledger has it."""

    def profile(self) -> dict[str, Any]:
        """What of this device the bits depend on, besides what the CPU's numerics profile says."""

    def probe(self) -> str:
        """A digest of what a few kernels compute here: two workers agree on it, or on nothing."""
