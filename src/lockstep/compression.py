"""Compression between hosts: what a group of shards gives the others is made small, by choice.

The shards of a job are divided into *groups*: equal complete subtrees of the tree along which they
are summed. A group's sum is made small by a codec, and what that leaves out is kept as its
*residual* and added to its next sum. All hosts, the group's own as well, sum what the codec has
left: so the numbers depend on the codec and on the number of groups, but not on who computes.

A group's residual is part of the run's state. One host alone has it, as long as others compute
other groups. It is there twice, for even and odd steps: a step that is begun again finds it as it
was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lockstep.codecs import Codec
from lockstep.layout import Block
from lockstep.presence import Presence
from lockstep.slots import Slot
from lockstep.state import SharedState, residual_name, storage_run


class Compressor:
    """One worker's part: of each group some blocks. Made anew when the membership changes."""

    def __init__(
        self,
        shared: SharedState,
        codec: Codec,
        groups: Sequence[range],
        mine: range,
        leaves: Sequence[Slot],
        blocks: Sequence[int],
    ) -> None:
        """`groups` are all hosts', `mine` the shards of this one; `leaves` has the sum of each of
        its groups, by first shard."""
        self.shared, self.codec = shared, codec
        numbers = [n for n in blocks if shared.blocks[n].param not in shared.tables]
        self._blocks = [(number, shared.blocks[number]) for number in numbers]
        self._groups = list(enumerate(groups))
        self._mine = [(place, group) for place, group in self._groups if group.start in mine]
        self._leaves = leaves
        largest = max((block.size for _, block in self._blocks), default=0)
        self._sum, self._left = torch.empty(largest), torch.empty(largest)

    def compress(self, step: int, presence: Presence) -> None:
        """Make this host's groups' sums small. Called when they are made."""
        for place, group in self._mine:
            for number, block in self._blocks:
                before = self._residual(place, step, block)
                after = self._residual(place, step + 1, block)
                mask = presence.of(block.param)
                if not any(mask[shard] for shard in group):
                    after.copy_(before)
                    continue
                total, left = self._sum[: block.size], self._left[: block.size]
                run = storage_run(self._leaves[group.start].grads[block.param], block)
                torch.add(run, before, out=total)
                data = self.shared.packed(place, number)
                self.codec.encode(total, data)
                self.codec.decode(data, left)
                torch.sub(total, left, out=after)

    def restore(self) -> None:
        """Make what all hosts' groups have left numbers again."""
        for place, _ in self._groups:
            slot = self.shared.restored[place]
            for number, block in self._blocks:
                run = storage_run(slot.grads[block.param], block)
                self.codec.decode(self.shared.packed(place, number), run)

    def _residual(self, group: int, step: int, block: Block) -> torch.Tensor:
        name = residual_name(group, step % 2, self.shared.names[block.param])
        return storage_run(self.shared.view(name), block)
