"""Gradient compression between hosts, by choice: what one group of shards gives the others.

The shards of a job are divided into *groups*: equal complete subtrees of the tree along which they
are summed. A group's sum is made small by a codec, and what that leaves out is kept as its
*residual* and added to its next sum. All hosts, the group's own as well, sum what the codec has
left: so the numbers depend on the codec and on the number of groups, but not on who computes.

A group's residual is part of the run's state. One host alone has it, as long as others compute
other groups. It is there twice, for even and odd steps: a step that is begun again finds it as it
was.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lockstep.collectives.gradient_presence import GradientPresence
from lockstep.state.gradient_codecs import Codec
from lockstep.state.gradient_slots import GradientSlot
from lockstep.state.shared_state import SharedState, residual_name, storage_run


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A block of a group's sum, 1-D."""

    group: range
    param: int
    numbers: torch.Tensor
    residuals: tuple[torch.Tensor, torch.Tensor]
    """Before even steps, and before odd ones."""
    data: torch.Tensor
    """Where its bytes lie."""


class Compressor:
    """One worker's part: of each group some blocks. Made anew when the membership changes."""

    def __init__(
        self,
        shared: SharedState,
        codec: Codec,
        groups: Sequence[range],
        host_shards: range,
        leaves: Sequence[GradientSlot],
        blocks: Sequence[int],
    ) -> None:
        """`groups` are all hosts', `host_shards` the shards of this one; `leaves` has the sum of
        each of its groups, by first shard."""
        self.codec = codec
        numbers = [n for n in blocks if shared.blocks[n].param not in shared.tables]
        self._pieces: list[Piece] = []
        self._left: list[tuple[torch.Tensor, torch.Tensor]] = []
        """The bytes of all groups' blocks, and where the numbers go that are left of them."""
        for (index, group), number in itertools.product(enumerate(groups), numbers):
            block, data = shared.blocks[number], shared.packed(index, number)
            target = shared.restored[index].grads[block.param]
            self._left.append((data, storage_run(target, block)))
            if group.start in host_shards:
                names = [residual_name(index, odd, shared.names[block.param]) for odd in (0, 1)]
                even, odd = (storage_run(shared.view(name), block) for name in names)
                self._pieces.append(
                    Piece(
                        group=group,
                        param=block.param,
                        numbers=storage_run(leaves[group.start].grads[block.param], block),
                        residuals=(even, odd),
                        data=data,
                    )
                )
        largest = max((shared.blocks[number].size for number in numbers), default=0)
        self._spare = torch.empty(largest), torch.empty(largest)

    def compress(self, step: int, presence: GradientPresence) -> None:
        """Make this host's groups' sums small. Called when they are made."""
        for piece in self._pieces:
            before, after = piece.residuals[step % 2], piece.residuals[(step + 1) % 2]
            mask = presence.of(piece.param)
            if not any(mask[shard] for shard in piece.group):
                after.copy_(before)
                continue
            total, left = (spare[: before.numel()] for spare in self._spare)
            torch.add(piece.numbers, before, out=total)
            self.codec.encode(total, piece.data)
            self.codec.decode(piece.data, left)
            torch.sub(total, left, out=after)

    def restore(self) -> None:
        """Make what all hosts' groups have left numbers again."""
        for data, numbers in self._left:
            self.codec.decode(data, numbers)
