"""Moves: what a worker's home and its host's segments give each other in a step.

Others meet a worker at barriers alone. So what they need of its home is in the segments before it
arrives, and what it needs of theirs is loaded when all have come. Where homes are the segments
themselves, as here, there is nothing to be done.
"""

from __future__ import annotations

from lockstep.device.device import Device


class Moves:
    """One worker's, in one membership. In the order of a step."""

    subtrees: tuple[range, ...] = ()
    """What workers give each other the sums of; none where they give each shard's gradients."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.apart = device.apart
        self.digest = device.digest
        """The digest of a run of the state, by offset and size, once a step is committed."""

    def give_model(self) -> None:
        """Let others compute with the committed parameters and buffers."""

    def give_gradients(self, step: int) -> None:
        """Let others have what this worker's shards have left."""

    def take_gradients(self, step: int) -> None:
        """Get what others' shards have left, as far as this worker sums it."""

    def give_sums(self) -> None:
        """Let others have the summed gradient of this worker's blocks, before its norm is taken."""

    def take_sums(self) -> None:
        """Get the summed gradients whose norms this worker takes."""

    def give_state(self, step: int, *, due: bool) -> None:
        """Let others have what this worker has updated; all of it, where a snapshot is `due`."""

    def take_parameters(self) -> None:
        """Get what others have updated."""

    def rest(self, step: int) -> None:
        """Have this worker's part of the state after `step` steps in the host's segment."""
