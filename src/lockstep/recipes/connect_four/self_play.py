"""Games of a network against itself, and what there is to learn from them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lockstep.recipes.connect_four.rules import State, new_game, outcome, planes
from lockstep.recipes.connect_four.tree_search import Evaluate, Found, search


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Positions of whole games, and each one's mirror image after all of them."""

    boards: torch.Tensor
    """`[n, 2, 6, 7]`, as `planes` has them."""
    policies: torch.Tensor
    """`[n, 7]`: what the search has made of the network's policy."""
    values: torch.Tensor
    """`[n]`: between what the search expected and how the game ended."""
    weights: torch.Tensor
    """`[n]`: they sum to 1, and those of each game to the same."""


def self_play(
    games: int, evaluate: Evaluate, *, simulations: int, opening: int, trust: float
) -> Lessons:
    """Play games, all at once, each side searching; draws from Python's generator alone.

    Args:
        games: how many.
        evaluate: the network.
        simulations: of each search.
        opening: a game begins with up to so many moves at random, so that games differ and the
            network sees positions that nobody would play to.
        trust: how much of a value is the search's; the rest is the outcome.
    """
    states = [opened(random.randint(0, opening)) for _ in range(games)]
    histories: list[list[tuple[State, Found]]] = [[] for _ in states]
    while live := [index for index, state in enumerate(states) if not state.is_terminal()]:
        searched = search(
            [states[index] for index in live], evaluate, simulations=simulations, explore=True
        )
        for index, found in zip(live, searched, strict=True):
            histories[index].append((states[index], found))
            states[index] = states[index].child(found.action)
    return lessons(states, histories, trust)


def opened(moves: int) -> State:
    """A position after so many random moves, or as many as the game lasts but one."""
    state = new_game()
    for _ in range(moves):
        after = state.child(random.choice(state.legal_actions()))
        if after.is_terminal():
            break
        state = after
    return state


def lessons(
    ends: Sequence[State], histories: Sequence[Sequence[tuple[State, Found]]], trust: float
) -> Lessons:
    """What finished games, and the positions searched in each, have to teach."""
    states = [state for history in histories for state, _ in history]
    policies = torch.tensor([found.policy for history in histories for _, found in history])
    values = [
        trust * found.value + (1 - trust) * outcome(end, state.current_player())
        for end, history in zip(ends, histories, strict=True)
        for state, found in history
    ]
    weights = torch.tensor([1 / len(history) for history in histories for _ in history])
    boards = planes(states)
    return Lessons(
        boards=torch.cat([boards, boards.flip(3)]),
        policies=torch.cat([policies, policies.flip(1)]),
        values=torch.tensor(values).repeat(2),
        weights=weights.repeat(2) / (2 * len(histories)),
    )
