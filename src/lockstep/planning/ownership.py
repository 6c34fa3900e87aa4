"""Ownership: which host computes, which one sums which gradients, and who updates what. Pure.

    replicated   every host updates everything, so the loss of one loses nothing (the default)
    sharded      each host updates some of the parameters, and gives the others what becomes of them
    servers      some hosts do that, and compute no gradients: a synchronous parameter server
    slices       all hosts compute each shard together, each some of the slices that matrices are
                 cut into, and each keeps and updates these alone

Large tables, whose gradients are the rows that were touched, are updated on every host always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from lockstep.errors import JobError
from lockstep.planning.byte_ranges import ByteRange, cut_evenly
from lockstep.planning.slot_map import SlotMap
from lockstep.planning.teams import slices_of

Returns = Literal["nothing", "sums", "parameters", "digests"]
"""What hosts give each other when they have summed their share of the gradients. `digests`: each
needs its own parameters alone, and the ledger a digest of all."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one host does for all others."""

    sums: tuple[ByteRange, ...] = ()
    """The runs of a slot's bytes that it alone sums."""
    params: tuple[int, ...] = ()
    """The trainable parameters that it alone updates."""


@dataclass(frozen=True, kw_only=True)
class Duties:
    """Who does what under an arrangement. Without shares, every host does everything."""

    returns: Returns = "nothing"
    shares: Mapping[str, Share]

    @property
    def owned_apart(self) -> bool:
        """Whether each host updates parameters of its own."""
        return owned_apart(self.returns)


def owned_apart(returns: Returns) -> bool:
    """Whether hosts that give each other this update parameters of their own."""
    return returns in ("parameters", "digests")


class Ownership(Protocol):
    """How hosts divide the work.

    - The shares of all hosts are disjoint, and together all gradients but those of large tables.
    - `duties` and `computing` depend on nothing but their arguments: every host finds the same.
    """

    @property
    def whole(self) -> bool:
        """Whether every host has the whole state. If not, the loss of one is the loss of its part,
        and all roll back to the snapshot of the coordinating host."""

    @property
    def together(self) -> bool:
        """Whether all hosts compute each shard together."""

    def computing(self, hosts: Sequence[str]) -> tuple[str, ...]:
        """Those of these hosts that compute gradients; at least one."""

    def duties(self, hosts: Sequence[str], slot_map: SlotMap) -> Duties:
        """Who sums and updates what."""


DIRECT = 2
"""Up to so many hosts everybody sends its sums to everybody: one message's delay, and the volume of
a ring. More hosts would send more than a ring does: each sums a part, and returns it."""


@dataclass(frozen=True)
class Replicated:
    """Every host updates everything. `whole` is False where its shards have something beside that
    it alone keeps: what their own optimizers remember from one round of local steps to the next."""

    whole: bool = True
    together = False

    def computing(self, hosts: Sequence[str]) -> tuple[str, ...]:
        return tuple(hosts)

    def duties(self, hosts: Sequence[str], slot_map: SlotMap) -> Duties:
        if len(hosts) <= DIRECT:
            return Duties(shares={})
        cuts = [cut_evenly(bucket.byte_range, len(hosts)) for bucket in slot_map.buckets]
        shares = {
            host: Share(sums=tuple(pieces[number] for pieces in cuts if pieces[number].nbytes))
            for number, host in enumerate(hosts)
        }
        return Duties(returns="sums", shares=shares)


@dataclass(frozen=True)
class Sharded:
    """Each host updates some of the parameters, whole ones."""

    whole = False
    together = False

    def computing(self, hosts: Sequence[str]) -> tuple[str, ...]:
        return tuple(hosts)

    def duties(self, hosts: Sequence[str], slot_map: SlotMap) -> Duties:
        return _by_parameter(hosts, slot_map, hosts)


@dataclass(frozen=True)
class Servers:
    """The hosts of these names update, the others compute. As long as there is none of the one or
    the other kind, those that there are do both."""

    names: frozenset[str]
    whole = False
    together = False

    def computing(self, hosts: Sequence[str]) -> tuple[str, ...]:
        return tuple(host for host in hosts if host not in self.names) or tuple(hosts)

    def duties(self, hosts: Sequence[str], slot_map: SlotMap) -> Duties:
        servers = [host for host in hosts if host in self.names] or hosts
        return _by_parameter(servers, slot_map, hosts)


@dataclass(frozen=True)
class Compressed(Replicated):
    """Every host updates everything, from what a codec has left of everybody's gradients; but what
    it has left out stays where it was (see `compression`)."""

    whole: bool = False

    def duties(self, hosts: Sequence[str], slot_map: SlotMap) -> Duties:
        return Duties(shares={})  # sums would be as large again as what was made small


@dataclass(frozen=True)
class Slices:
    """Each host keeps and updates some of the slices, and what is not cut is on all."""

    whole = False
    together = True

    def computing(self, hosts: Sequence[str]) -> tuple[str, ...]:
        return tuple(hosts)

    def duties(self, hosts: Sequence[str], slot_map: SlotMap) -> Duties:
        if len(hosts) == 1:
            return Duties(shares={})
        slices = max(slot_map.slice_of.values(), default=-1) + 1
        check_slices(slices, hosts)
        shares = {}
        for position, host in enumerate(hosts):
            own = slices_of(slices, len(hosts), position)
            params = sorted(param for param, number in slot_map.slice_of.items() if number in own)
            shares[host] = Share(params=tuple(params))
        return Duties(returns="digests", shares=shares)


def check_slices(slices: int, hosts: Sequence[str]) -> None:
    """Check that every host has a slice.

    Raises:
        JobError: there are more hosts.
    """
    if len(hosts) > slices:
        raise JobError(
            "there are more hosts than slices: some would have nothing to keep",
            expected=f"at most {slices} hosts" if slices else "a model with matrices that are cut",
            found=f"{len(hosts)}: {', '.join(hosts)}",
            fix="raise slices (the numbers depend on it), or leave out ownership, or a host",
        )


def ownership_of(
    kind: str, servers: Sequence[str] = (), compression: str = "none", local_steps: int = 1
) -> Ownership:
    """The ownership of a job's settings. `servers` are hosts, by name."""
    if compression != "none":
        return Compressed()
    match kind:
        case "replicated":
            return Replicated(whole=local_steps == 1)
        case "sharded":
            return Sharded()
        case "servers":
            return Servers(frozenset(servers))
        case "slices":
            return Slices()
    raise ValueError(kind)


def _by_parameter(owners: Sequence[str], slot_map: SlotMap, hosts: Sequence[str]) -> Duties:
    """Give each owner a run of whole parameters, of about the same number of bytes."""
    if len(hosts) == 1:
        return Duties(shares={})
    total, before = sum(place.nbytes for place in slot_map.grads.values()) or 1, 0
    runs: dict[str, list[int]] = {host: [] for host in hosts}
    for param, place in slot_map.grads.items():
        middle = 2 * before + place.nbytes
        runs[owners[min(middle * len(owners) // (2 * total), len(owners) - 1)]].append(param)
        before += place.nbytes
    shares = {
        host: Share(sums=tuple(slot_map.grads[param] for param in run), params=tuple(run))
        for host, run in runs.items()
    }
    return Duties(returns="parameters", shares=shares)
