"""Terminal: a person plays against a trained network, or the network against itself."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lockstep.errors import JobError
from lockstep.recipes.connect_four.rules import COLUMNS, State, new_game, outcome
from lockstep.recipes.connect_four.tree_search import Evaluate, search

if TYPE_CHECKING:
    from rich.console import Console

Ask = Callable[[str], str]
"""Shows a prompt and returns a line; raises EOFError at the end of input."""

STONES = {".": "·", "x": "[bold red]●[/]", "o": "[bold yellow]○[/]"}
PLAIN = {".": ".", "x": "x", "o": "o"}
"""For terminals whose encoding does not have the others."""
NUMBERS = " ".join(str(column + 1) for column in range(COLUMNS))
GUESSES = 20
"""After so many invalid answers in a row the game ends: nobody reads the prompts."""


def start(run: str | Path, *, second: bool, itself: bool, simulations: int) -> None:
    """Play a game on this terminal.

    Args:
        run: a finished run of the recipe `game`.
        second: the network begins.
        itself: the network plays both sides.
        simulations: positions that the search evaluates per move.
    """
    from rich.console import Console

    console, network = Console(), network_of(run)

    def ask(prompt: str) -> str:
        if sys.stdin is None:  # closed before this process began
            raise EOFError
        return console.input(prompt)

    if itself:
        against_itself(network, console, simulations=simulations)
    else:
        against_person(network, console, ask, second=second, simulations=simulations)


def network_of(run: str | Path) -> Evaluate:
    """The network of a finished run of the recipe `game`.

    Raises:
        JobError: the run is one of another task.
        RunFolderError: the run is not finished.
    """
    from lockstep.recipes.connect_four.network import Net, evaluator
    from lockstep.results.result import Result

    result = Result.open(run)
    name = "a task of a script" if result.source is None else result.source.name
    model = None if result.source is None else result.model()
    if not isinstance(model, Net):
        raise JobError(
            f"{run} has not learned to play",
            expected="a run of the recipe game",
            found=name,
            fix="lockstep run game, and then: lockstep play RUN",
        )
    return evaluator(model)


def best(state: State, network: Evaluate, simulations: int) -> tuple[int, float]:
    """The network's move, and its value for the network, -1 to 1."""
    (found,) = search([state], network, simulations=simulations, explore=False)
    return found.action, found.value


def stones_of(console: Console) -> dict[str, str]:
    """The symbols of this console for empty cells and for both sides' stones."""
    return STONES if console.encoding.startswith("utf") else PLAIN


def show(state: State, console: Console) -> None:
    """Print the board, and under it the numbers of its columns."""
    stones = stones_of(console)
    for row in str(state).split():
        console.print(" ".join(stones[stone] for stone in row), highlight=False)
    console.print(NUMBERS, highlight=False)


def read_move(state: State, console: Console, ask: Ask) -> int | None:
    """A person's column, from 0; None to leave."""
    for _ in range(GUESSES):
        try:
            answer = ask("your column (q to leave): ").strip()
        except EOFError:
            console.print()
            return None
        if answer.lower() in ("q", "quit"):
            return None
        column = int(answer) - 1 if answer.isdecimal() and len(answer) < 4 else -1
        if column in state.legal_actions():
            return column
        free = ", ".join(str(action + 1) for action in state.legal_actions())
        console.print(f"{answer!r} is no move; these are: {free}", markup=False, highlight=False)
    return None


def against_person(
    network: Evaluate, console: Console, ask: Ask, *, second: bool, simulations: int
) -> float | None:
    """Play a game against a person. Returns its outcome for them, or None if they left."""
    state, person = new_game(), 1 if second else 0
    console.print(
        f"You are {stones_of(console)['xo'[person]]}, and {'second' if second else 'begin'}."
    )
    show(state, console)
    while not state.is_terminal():
        if state.current_player() == person:
            column = read_move(state, console, ask)
            if column is None:
                console.print("You have left the game.")
                return None
            state.apply_action(column)
        else:
            column, value = best(state, network, simulations)
            state.apply_action(column)
            hope = f"{(1 + value) / 2:.0%}"
            console.print(
                f"The network plays {column + 1}. It gives itself {hope}.", highlight=False
            )
        show(state, console)
    worth = outcome(state, person)
    console.print({1.0: "You have won.", 0.0: "A draw.", -1.0: "The network has won."}[worth])
    return worth


def against_itself(network: Evaluate, console: Console, *, simulations: int) -> float:
    """Play a game of the network against itself. Returns its outcome for the first player."""
    state, moves = new_game(), list[str]()
    while not state.is_terminal():
        column, _ = best(state, network, simulations)
        state.apply_action(column)
        moves.append(str(column + 1))
    show(state, console)
    console.print(f"moves: {' '.join(moves)}", highlight=False, soft_wrap=True)
    worth = outcome(state, 0)
    stones = stones_of(console)
    first, other = f"{stones['x']}, who began, has won.", f"{stones['o']} has won."
    console.print({1.0: first, 0.0: "A draw.", -1.0: other}[worth])
    return worth
