"""Self-play: games of a network against itself, as training positions."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lockstep.recipes.connect_four.rules import State, new_game, outcome, planes
from lockstep.recipes.connect_four.tree_search import Evaluate, Found, search


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """Lessons: training positions of whole games, followed by the mirror image of each."""

    boards: torch.Tensor
    """`[n, 2, 6, 7]`, as `planes` has them."""
    policies: torch.Tensor
    """`[n, 7]`: the policies that the search has found."""
    values: torch.Tensor
    """`[n]`: a weighted mean of the search's value and the outcome of the game."""
    weights: torch.Tensor
    """`[n]`: their sum is 1, and every game has the same share of it."""


def self_play(
    games: int, evaluate: Evaluate, *, simulations: int, opening: int, trust: float
) -> Lessons:
    """Play games side by side, both sides with a search. Draws from Python's generator alone.

    Args:
        games: number of games.
        evaluate: the network.
        simulations: positions evaluated per search.
        opening: most random moves at the beginning of a game, so that games differ and reach
            positions that no player would choose.
        trust: the weight of the search's value against the outcome, 0 to 1.
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
    """A state after `moves` random moves, or before the one that would end the game."""
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
    """The training positions of finished games and of the searches in them."""
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
