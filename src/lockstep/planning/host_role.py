"""Host role: what each host does in every step, as long as the hosts stay the same. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from lockstep.planning.byte_ranges import ByteRange, complement
from lockstep.planning.data_partition import shard_ranges
from lockstep.planning.memory_layout import Kind, Layout
from lockstep.planning.ownership import Duties, Ownership
from lockstep.planning.plan import Plan
from lockstep.planning.shard_placement import ShardPlacement
from lockstep.planning.slot_map import SlotMap


@dataclass(frozen=True, kw_only=True)
class HostRole:
    """Who computes, sums and updates what. `host` is the one that asks."""

    host: str
    plan: Plan
    ownership: Ownership
    placement: ShardPlacement
    duties: Duties
    generation: int = 0
    """The number of this arrangement of hosts."""

    @staticmethod
    def alone(host: str, plan: Plan, ownership: Ownership) -> HostRole:
        """One host does everything."""
        placement = ShardPlacement.of(plan.shards, {host: plan.workers}, _group(plan))
        return HostRole(
            host=host,
            plan=plan,
            ownership=ownership,
            placement=placement,
            duties=Duties(shares={}),
        )

    def among(self, workers: Mapping[str, int], slot_map: SlotMap, generation: int) -> HostRole:
        """The roles of these hosts, by their numbers of workers, in this order."""
        computing = self.ownership.computing(list(workers))
        counts = {name: count * (name in computing) for name, count in workers.items()}
        if self.ownership.together:
            placement = ShardPlacement.together(self.plan.shards, counts)
        else:
            placement = ShardPlacement.of(
                self.plan.shards, counts, _group(self.plan), shard_ranges(self.plan.holdings)
            )
        return HostRole(
            host=self.host,
            plan=self.plan,
            ownership=self.ownership,
            placement=placement,
            duties=self.ownership.duties(list(workers), slot_map),
            generation=generation,
        )

    @property
    def several(self) -> bool:
        """Whether other hosts take part."""
        return len(self.placement.parts) > 1

    @property
    def parted(self) -> bool:
        """Whether each host has a part of the state, and none has the whole of it."""
        return self.several and not self.ownership.whole

    @property
    def together(self) -> bool:
        """Whether this host computes each shard together with others."""
        return self.several and self.ownership.together

    @property
    def position(self) -> int:
        """This host's place among the hosts."""
        return [part.name for part in self.placement.parts].index(self.host)

    @property
    def others(self) -> list[str]:
        """The other hosts."""
        return [part.name for part in self.placement.others(self.host)]

    @property
    def shards(self) -> range:
        """The shards that this host computes."""
        return self.placement.part(self.host).shards

    @property
    def subtrees(self) -> tuple[range, ...]:
        """The subtrees that are summed by themselves: of all hosts, or the groups; none where this
        host is alone and nothing is made small."""
        return self.placement.subtrees if self.several or self.plan.groups else ()

    @property
    def sums(self) -> tuple[ByteRange, ...]:
        """The runs of a slot's bytes that this host sums, and returns the sums of."""
        return self.duties.shares[self.host].sums if self.duties.returns == "sums" else ()

    @property
    def remote_params(self) -> list[int]:
        """The trainable parameters that other hosts alone update."""
        shares = self.duties.shares.items()
        return [param for name, share in shares if name != self.host for param in share.params]

    @property
    def owned_params(self) -> frozenset[int]:
        """The trainable parameters that some host alone updates."""
        return frozenset(param for share in self.duties.shares.values() for param in share.params)

    def part_of(self, name: str, layout: Layout) -> list[ByteRange]:
        """The bytes of the state that only the host of this name has: of the optimizer state (and
        the parameters, if others do not have them), what its groups have left out, and what its
        shards' optimizers keep."""
        own = self.placement.part(name)
        groups = [self.subtrees.index(tree) for tree in own.subtrees] if self.plan.groups else []
        kinds: tuple[Kind, ...] = ("param", "optim")
        if self.duties.returns == "parameters":
            kinds = ("optim",)  # of parameters everybody has a copy
        params = self.duties.shares[name].params if name in self.duties.shares else ()
        return [
            *layout.ranges_of(params, kinds),
            *layout.apart("residual", groups),
            *layout.apart("local", own.shards),
        ]

    def kept(self, layout: Layout) -> list[ByteRange] | None:
        """The bytes of the state that this host has memory for; None: all of them."""
        return self.needed_by(self.host, layout) if self.together else None

    def needed_by(self, name: str, layout: Layout) -> list[ByteRange] | None:
        """The bytes of the state that are not for some other host alone; None: all of them."""
        if self.ownership.whole:
            return None
        others = self.placement.others(name)
        apart = itertools.chain.from_iterable(self.part_of(o.name, layout) for o in others)
        return complement(layout.state_bytes, apart)


def _group(plan: Plan) -> int:
    """How many shards are in a group; 0: there are none."""
    return plan.shards // plan.groups if plan.groups else 0
