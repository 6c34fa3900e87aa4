"""Regroup messages: in what state a host is, and how it goes on after a regrouping."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from lockstep.system.messages import Count, Label, Message, Step

Action = Literal["keep", "back", "copy"]
"""The state stays; it is rolled back to the snapshot; it is copied from the donor."""
Address = tuple[Label, Annotated[int, msgspec.Meta(ge=0, le=65535)]]
"""A host's address, and a port; 0 where nobody listens."""
MAX_HOSTS = 4096


class HostStatus(Message):
    """In what state a host is at rest."""

    whole: Step | None
    """After how many steps its state is; None: it is corrupted, or not there yet."""
    snapshot: Step | None
    """The same of its snapshot; None: it has none."""
    workers: Count | None = None
    """How many it has, where they need partners on other hosts; None: as it said when it came."""
    address: Address = ("", 0)
    """Where it listens to other hosts in this generation."""


class RegroupOrder(Message):
    """How a host goes on after a regrouping."""

    step: Step
    workers: Annotated[dict[Label, Count], msgspec.Meta(max_length=MAX_HOSTS)]
    """By host, in the order in which they share out the shards."""
    addresses: Annotated[dict[Label, Address], msgspec.Meta(max_length=MAX_HOSTS)]
    actions: Annotated[dict[Label, Action], msgspec.Meta(max_length=MAX_HOSTS)]
    source: Label
    """The donor: whom the state is copied from."""

    @property
    def copying(self) -> list[str]:
        """The hosts that get the state from the donor."""
        return [name for name, action in self.actions.items() if action == "copy"]
