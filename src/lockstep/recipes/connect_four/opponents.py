"""Opponents: scripted players of Connect Four, and games against them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lockstep.recipes.connect_four.rules import State, new_game, outcome

Choose = Callable[[Sequence[State]], Sequence[int]]
"""A player: from states of unfinished games to columns."""

OPPONENTS = ("random", "one_ply", "two_ply")
"""The scripted players. `one_ply` plays a winning move if there is one; `two_ply` also avoids moves
after which the other can win at once. Otherwise both play at random."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """Match: a game against a scripted player, whose draws are seeded."""

    opponent: str
    first: bool
    """Whether the scripted player begins."""
    seed: int


def scripted(state: State, opponent: str, draw: random.Random) -> int:
    """The column that a scripted player chooses."""
    actions: list[int] = state.legal_actions()
    if opponent == "random":
        return draw.choice(actions)
    after = {action: state.child(action) for action in actions}
    wins = [action for action in actions if _won(after[action], state.current_player())]
    if wins:
        return draw.choice(wins)
    if opponent == "two_ply":
        safe = [action for action in actions if not _can_be_won(after[action])]
        return draw.choice(safe or actions)
    return draw.choice(actions)


def _won(state: State, player: int) -> bool:
    return state.is_terminal() and outcome(state, player) > 0


def _can_be_won(state: State) -> bool:
    """Whether the player to move can win with one move."""
    if state.is_terminal():
        return False
    player = state.current_player()
    return any(_won(state.child(action), player) for action in state.legal_actions())


def play(matches: Sequence[Match], choose: Choose) -> list[float]:
    """Play the games side by side. Returns the outcome of each for `choose`: 1, 0 or -1."""
    states = [new_game() for _ in matches]
    draws = [random.Random(match.seed) for match in matches]
    while any(not state.is_terminal() for state in states):
        mine = []
        for match, state, draw in zip(matches, states, draws, strict=True):
            if state.is_terminal():
                continue
            if (state.current_player() == 0) == match.first:
                state.apply_action(scripted(state, match.opponent, draw))
            if not state.is_terminal():
                mine.append(state)
        for state, action in zip(mine, choose(mine) if mine else [], strict=True):
            state.apply_action(action)
    return [
        outcome(state, 1 if match.first else 0)
        for match, state in zip(matches, states, strict=True)
    ]
