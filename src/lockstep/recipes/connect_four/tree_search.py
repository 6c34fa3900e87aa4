"""Tree search: Gumbel AlphaZero search with few simulations, for many games at once.

The method is that of Danihelka, Guez, Schrittwieser and Silver, "Policy improvement by planning
with Gumbel", 2022: actions at the root are drawn without replacement by Gumbel noise and halved
until two are left; deeper in the tree, visits follow the improved policy. Its policy improves on
the network's with any number of simulations, so that two cores suffice.

The actions considered at the root have trees of their own, which are independent of each other.
So one simulation for each of them, in each of the games, makes one batch for the network.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lockstep.recipes.connect_four.rules import COLUMNS, State, outcome

Evaluate = Callable[[Sequence[State]], tuple[list[list[float]], list[float]]]
"""States to the network's logits `[n, 7]` and values `[n]`, these for the player to move."""

VISITS, SCALE = 50.0, 0.1
"""The weight of values against logits is `SCALE * (VISITS + the most visits of an action)`."""


@dataclass(slots=True)
class Node:
    """Node: a state and its statistics. Values are for the player to move."""

    state: State
    actions: list[int] = field(default_factory=list)
    """The legal columns; empty if the game is over, and before `expand`."""
    logits: list[float] = field(default_factory=list)
    """For each action, as the next four fields."""
    prior: list[float] = field(default_factory=list)
    visits: list[int] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)
    children: list[Node | None] = field(default_factory=list)
    value: float = 0.0
    """The network's value, or the outcome of the finished game."""
    over: bool = False

    def expand(self, logits: Sequence[float], value: float) -> None:
        """Add the network's logits and value."""
        self.actions = self.state.legal_actions()
        self.logits = [logits[action] for action in self.actions]
        self.prior = softmax(self.logits)
        self.visits, self.totals = [0] * len(self.actions), [0.0] * len(self.actions)
        self.children = [None] * len(self.actions)
        self.value = value

    def child(self, index: int) -> Node:
        """The node after an action, made on first use."""
        found = self.children[index]
        if found is None:
            state = self.state.child(self.actions[index])
            found = Node(state)
            if state.is_terminal():
                found.over, found.value = True, outcome(state, 1 - self.state.current_player())
            self.children[index] = found
        return found

    def completed(self) -> list[float]:
        """The value of each action: the mean of its visits, or if it has none, a mix of the
        network's value and those of the visited actions (the paper's equation 33)."""
        visited = sum(self.visits)
        if not visited:
            return [self.value] * len(self.actions)
        means = [t / n if n else 0.0 for t, n in zip(self.totals, self.visits, strict=True)]
        mass = weighted = 0.0
        for prior, mean, visits in zip(self.prior, means, self.visits, strict=True):
            if visits:
                mass += prior
                weighted += prior * mean
        mixed = (self.value + visited * weighted / mass) / (1 + visited)
        return [mean if n else mixed for mean, n in zip(means, self.visits, strict=True)]

    def improved(self) -> list[float]:
        """The improved logits of each action, after the visits so far."""
        weight = SCALE * (VISITS + max(self.visits))
        return [
            logit + weight * value
            for logit, value in zip(self.logits, self.completed(), strict=True)
        ]

    def choose(self) -> int:
        """The action to visit next, so that visits become proportional to the improved policy."""
        policy, total = softmax(self.improved()), 1 + sum(self.visits)
        lead = [p - n / total for p, n in zip(policy, self.visits, strict=True)]
        return lead.index(max(lead))


@dataclass(frozen=True, kw_only=True)
class Found:
    """Found: the result of a search from one state."""

    action: int
    """The column to play."""
    policy: list[float]
    """The improved policy over all seven columns; 0 for a full one."""
    value: float
    """The value of the state for the player to move, under that policy."""


def softmax(logits: Sequence[float]) -> list[float]:
    """The softmax of logits."""
    highest = max(logits)
    powers = [math.exp(logit - highest) for logit in logits]
    total = sum(powers)
    return [power / total for power in powers]


def halving(actions: int, simulations: int) -> list[int]:
    """Sequential halving: the number of actions that each round considers.

    Each considered action gets one simulation. Rounds halve the actions, down to two.
    """
    phases, considered, rounds = max(1, math.ceil(math.log2(actions))), actions, list[int]()
    while simulations > sum(rounds):
        for _ in range(max(1, simulations // (phases * considered))):
            rounds.append(min(considered, simulations - sum(rounds)))
            if sum(rounds) == simulations:
                break
        considered = min(actions, max(2, considered // 2))
    return rounds


def gumbel() -> float:
    """A Gumbel draw from Python's generator."""
    return -math.log(-math.log(random.random() or 0.5))


class Tree:
    """Tree: the search from one state."""

    def __init__(self, state: State, simulations: int, explore: bool) -> None:
        self.root, self.simulations, self.explore = Node(state), simulations, explore
        self.noise: list[float] = []
        self.considered: list[int] = []
        self.rounds: list[int] = []
        self.paths: list[list[tuple[Node, int]]] = []

    def begin(self, logits: Sequence[float], value: float) -> None:
        """Start with the network's logits and value of the state."""
        self.root.expand(logits, value)
        count = len(self.root.actions)
        self.noise = [gumbel() if self.explore else 0.0 for _ in range(count)]
        self.rounds = halving(count, self.simulations)
        self.considered = list(range(count))

    def descend(self) -> list[Node]:
        """The leaves of this round's simulations, one for each action considered; none after the
        last round. Leaves that are not over need `expand`; then call `rise`."""
        self.paths = []
        if not self.rounds:
            return []
        self.considered = self.ranked()[: self.rounds.pop(0)]
        ends = []
        for index in self.considered:
            path, node = [(self.root, index)], self.root.child(index)
            while node.actions:
                path.append((node, node.choose()))
                node = node.child(path[-1][1])
            self.paths.append(path)
            ends.append(node)
        return ends

    def rise(self, ends: Sequence[Node]) -> None:
        """Back up the values of the leaves to the root."""
        for path, end in zip(self.paths, ends, strict=True):
            value = end.value
            for node, index in reversed(path):
                value = -value
                node.visits[index] += 1
                node.totals[index] += value

    def ranked(self) -> list[int]:
        """The actions that are still considered, the best first."""
        scores = self.root.improved()
        return sorted(self.considered, key=lambda index: -(self.noise[index] + scores[index]))

    def found(self) -> Found:
        """The result of the search."""
        root = self.root
        policy, values = softmax(root.improved()), root.completed()
        spread = [0.0] * COLUMNS
        for action, probability in zip(root.actions, policy, strict=True):
            spread[action] = probability
        value = sum(p * v for p, v in zip(policy, values, strict=True))
        return Found(action=root.actions[self.ranked()[0]], policy=spread, value=value)


def search(
    states: Sequence[State], evaluate: Evaluate, *, simulations: int, explore: bool
) -> list[Found]:
    """Search from each of the states, none of which is over.

    Args:
        states: the states.
        evaluate: the network.
        simulations: positions evaluated per search, besides the first.
        explore: draw actions by Gumbel noise from Python's generator; otherwise take the best.
    """
    trees = [Tree(state, simulations, explore) for state in states]
    for tree, logits, value in zip(trees, *evaluate(states), strict=True):
        tree.begin(logits, value)
    while True:
        ends = [tree.descend() for tree in trees]
        if not any(ends):
            return [tree.found() for tree in trees]
        fresh = [node for nodes in ends for node in nodes if not node.over]
        if fresh:
            answers = zip(*evaluate([node.state for node in fresh]), strict=True)
            for node, (logits, value) in zip(fresh, answers, strict=True):
                node.expand(logits, value)
        for tree, nodes in zip(trees, ends, strict=True):
            tree.rise(nodes)
