"""Team: a member's view of the workers that compute a shard together, each some of its slices.

What all slices need or make is exchanged over the team's board. What is outside of slices is
computed by every member, from the same batch with the same seed, so all come to the same exchanges
in the same order: forwards in that of the code, backwards in the reverse of it, since autograd runs
the node first that was made last.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch

from lockstep.planning.reduction_tree import Node, subtrees, tree
from lockstep.planning.teams import slices_of
from lockstep.slices.board import FINISHED, Board

TOTAL, JOIN = FINISHED + 1, FINISHED + 2
"""Kinds of exchanges."""
Part = torch.Tensor | None
"""A slice's part of a result. None: autograd has no gradient."""


class Team:
    """One member's, for one shard after the other."""

    def __init__(
        self, board: Board, slices: int, at_exchange: Callable[[str, int], None] | None = None
    ) -> None:
        """`at_exchange`: told the phase, and which of its exchanges comes next, for faults."""
        self.board, self.slices = board, slices
        self.size = len(board.members)
        self.position = board.members.index(board.worker_id)
        self.phase = "forward"
        self._before = 0
        """How many exchanges there were before this phase."""
        self._at_exchange = at_exchange

    def begin(self, phase: str) -> None:
        """A phase of the shard begins."""
        self.phase, self._before = phase, self.board.count

    def own(self, slices: int) -> range:
        """The slices that this member computes."""
        return slices_of(slices, self.size, self.position)

    def total(self, parts: Sequence[Part], slices: int) -> Part:
        """The sum of all slices' parts along the tree, of which these are this member's."""
        runs = _runs(slices, self.size)
        first = runs[self.position][0].start
        sums = [
            _fold(_subtree(slices, run), {i: parts[i - first] for i in run})
            for run in runs[self.position]
        ]
        found = self._exchange(TOTAL, sums)
        known = {
            run: value
            for member, values in zip(runs, found, strict=True)
            for run, value in zip(member, values, strict=True)
        }
        result = _fold_runs(_subtree(slices, range(slices)), known)
        if any(result is value for value in known.values()):  # no other has any
            return None if result is None else result.clone()
        return result

    def join(self, parts: Sequence[torch.Tensor], dim: int) -> torch.Tensor:
        """All slices' parts side by side, of which these are this member's."""
        found = self._exchange(JOIN, parts)
        return torch.cat([part for member in found for part in member if part is not None], dim)

    def _exchange(self, kind: int, parts: Sequence[Part]) -> list[list[Part]]:
        """What each member shows."""
        board = self.board
        if self._at_exchange is not None:
            self._at_exchange(self.phase, board.count - self._before)
        board.show(kind, parts)
        return [
            list(parts) if member == board.worker_id else board.shown(member, kind)
            for member in board.members
        ]


_current: Team | None = None


def current() -> Team | None:
    """The team with which this process computes a shard just now; None: it does so alone."""
    return _current


@contextlib.contextmanager
def computing_with(team: Team) -> Iterator[None]:
    """Have sliced modules compute this member's slices alone, and exchange the rest."""
    global _current
    assert _current is None
    _current = team
    try:
        yield
    finally:
        _current = None


@lru_cache(maxsize=64)
def _runs(slices: int, members: int) -> tuple[tuple[range, ...], ...]:
    """By member: its slices, as complete subtrees, which it can sum by itself."""
    found = []
    for position in range(members):
        own = slices_of(slices, members, position)
        found.append(tuple(subtrees(slices, own.start, own.stop)))
    return tuple(found)


@lru_cache(maxsize=256)
def _subtree(slices: int, run: range) -> Node:
    """The node of the tree over slices that has just these."""
    node = tree(tuple(index in run for index in range(slices)))
    assert node is not None
    return node


def _fold(node: Node, parts: dict[int, Part]) -> Part:
    if isinstance(node, int):
        return parts[node]
    return _sum(_fold(node[0], parts), _fold(node[1], parts))


def _fold_runs(node: Node, known: dict[range, Part]) -> Part:
    run = _run_of(node)
    if run in known:
        return known[run]
    assert not isinstance(node, int)
    return _sum(_fold_runs(node[0], known), _fold_runs(node[1], known))


def _run_of(node: Node) -> range:
    first, last = node, node
    while not isinstance(first, int):
        first = first[0]
    while not isinstance(last, int):
        last = last[1]
    return range(first, last + 1)


def _sum(one: Part, other: Part) -> Part:
    """As autograd adds gradients, of which there may be none."""
    if one is None or other is None:
        return one if other is None else other
    return one + other
