"""Connect Four: what the network sees, the search, the opponents, the lessons, and the terminal."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lockstep.recipes.connect_four import terminal
from lockstep.recipes.connect_four.network import likeliest
from lockstep.recipes.connect_four.opponents import OPPONENTS, Match, play, scripted
from lockstep.recipes.connect_four.rules import COLUMNS, ROWS, State, new_game, outcome, planes
from lockstep.recipes.connect_four.self_play import self_play
from lockstep.recipes.connect_four.tree_search import Evaluate, halving, search

Board = list[list[int]]
"""Six rows, the top one first: 1 where the first player has a stone, 2 where the second has."""


def after(*columns: int) -> State:
    """The position after these moves."""
    state = new_game()
    for column in columns:
        state.apply_action(column)
    return state


def ignorant(states: Sequence[State]) -> tuple[list[list[float]], list[float]]:
    """A network that knows nothing."""
    return [[0.0] * COLUMNS for _ in states], [0.0] * len(states)


def hopeful(column: int) -> Evaluate:
    """A network that always prefers one column."""

    def evaluate(states: Sequence[State]) -> tuple[list[list[float]], list[float]]:
        return [[float(i == column) for i in range(COLUMNS)] for _ in states], [0.0] * len(states)

    return evaluate


# The rules are OpenSpiel's; these are the same, written anew, so that we know which they are.


def dropped(board: Board, column: int, stone: int) -> Board:
    row = max(row for row in range(ROWS) if not board[row][column])
    return [
        [stone if (r, c) == (row, column) else board[r][c] for c in range(COLUMNS)]
        for r in range(ROWS)
    ]


def has_four(board: Board, stone: int) -> bool:
    def own(row: int, column: int) -> bool:
        return 0 <= row < ROWS and 0 <= column < COLUMNS and board[row][column] == stone

    return any(
        all(own(row + i * down, column + i * right) for i in range(4))
        for row in range(ROWS)
        for column in range(COLUMNS)
        for down, right in ((0, 1), (1, 0), (1, 1), (1, -1))
    )


@given(st.integers(0, 2**32))
def test_the_rules_and_what_the_network_sees(seed: int) -> None:
    draw, state, board = random.Random(seed), new_game(), [[0] * COLUMNS for _ in range(ROWS)]
    while not state.is_terminal():
        player = state.current_player()
        legal = [column for column in range(COLUMNS) if not board[0][column]]
        assert state.legal_actions() == legal
        stones = torch.tensor(board)
        own, other = planes([state])[0]
        assert own.equal((stones == player + 1).float())
        assert other.equal((stones == 2 - player).float())
        column = draw.choice(legal)
        board = dropped(board, column, player + 1)
        state.apply_action(column)
        won = has_four(board, player + 1)
        assert state.is_terminal() == (won or all(board[0]))
    assert outcome(state, player) == float(won)
    assert outcome(state, 1 - player) == -float(won)


def test_planes_of_several_positions() -> None:
    both = planes([after(3), after(3, 3)])
    assert both.shape == (2, 2, ROWS, COLUMNS)
    assert both.dtype == torch.float32
    assert both[0, 1, 5, 3] == both[1, 0, 5, 3] == both[1, 1, 4, 3] == 1
    assert both.sum() == 3


# The search.


@given(st.integers(1, 7), st.integers(1, 200))
def test_halving_spends_every_simulation(actions: int, simulations: int) -> None:
    rounds = halving(actions, simulations)
    assert sum(rounds) == simulations
    assert rounds[0] == min(actions, simulations)
    assert all(1 <= considered <= actions for considered in rounds)
    assert rounds == sorted(rounds, reverse=True)


WINS = (after(0, 1, 0, 1, 0, 1), 0)  # x has three in column 0
BLOCKS = (after(6, 1, 0, 1, 6, 1), 1)  # o has three in column 1, and x has no three


@pytest.mark.parametrize(("state", "column"), [WINS, BLOCKS])
@pytest.mark.parametrize("explore", [False, True])
def test_search_wins_and_blocks_though_the_network_knows_nothing(
    state: State, column: int, explore: bool
) -> None:
    random.seed(1)
    (found,) = search([state], ignorant, simulations=64, explore=explore)
    assert found.policy.index(max(found.policy)) == column
    assert sum(found.policy) == pytest.approx(1)
    if not explore:
        assert found.action == column


def test_values_are_those_of_the_player_to_move() -> None:
    lost = after(2, 0, 3, 0, 4, 6)  # x to move has three with both ends free
    (found,) = search([lost], ignorant, simulations=64, explore=False)
    assert found.action in (1, 5)
    assert found.value > 0.9
    (found,) = search([after(2, 0, 3, 0, 4)], ignorant, simulations=200, explore=False)
    assert found.value < -0.5  # o can stop only one of the two


def test_a_full_column_is_never_chosen() -> None:
    state = after(3, 3, 3, 3, 3, 3)
    (found,) = search([state], hopeful(3), simulations=16, explore=True)
    assert found.policy[3] == 0
    assert found.action != 3


def test_a_search_does_not_depend_on_its_neighbours() -> None:
    states = [after(), after(3), WINS[0], BLOCKS[0]]
    together = search(states, ignorant, simulations=16, explore=False)
    assert together == [
        search([state], ignorant, simulations=16, explore=False)[0] for state in states
    ]


# Opponents and games against them.


def test_how_far_opponents_look() -> None:
    draws = {name: random.Random(0) for name in OPPONENTS}
    for _ in range(30):
        assert scripted(WINS[0], "one_ply", draws["one_ply"]) == WINS[1]
        assert scripted(WINS[0], "two_ply", draws["two_ply"]) == WINS[1]
        assert scripted(BLOCKS[0], "two_ply", draws["two_ply"]) == BLOCKS[1]
    for name in ("random", "one_ply"):
        assert {scripted(BLOCKS[0], name, draws[name]) for _ in range(200)} == set(range(COLUMNS))


def test_games_depend_on_their_seeds_alone() -> None:
    games = [
        Match(opponent=name, first=first, seed=seed)
        for name in OPPONENTS
        for first in (False, True)
        for seed in range(4)
    ]
    player = likeliest(hopeful(2))
    together = play(games, player)
    assert together == [play([match], player)[0] for match in games]
    assert {1.0, -1.0} <= set(together)


def test_who_begins() -> None:
    seen: list[str] = []

    def player(states: Sequence[State]) -> list[int]:
        seen.extend(str(state) for state in states if state.move_number() < 2)
        return [state.legal_actions()[0] for state in states]

    for first in (False, True):
        play([Match(opponent="random", first=first, seed=0)], player)
    assert [board.count("x") for board in seen] == [0, 1]


# Self-play.


def test_lessons() -> None:
    random.seed(5)
    learned = self_play(6, ignorant, simulations=8, opening=4, trust=0.0)
    count = len(learned.boards) // 2
    assert learned.boards[count:].equal(learned.boards[:count].flip(3))
    assert learned.policies[count:].equal(learned.policies[:count].flip(1))
    assert learned.policies.sum(dim=1).allclose(torch.ones(2 * count))
    assert set(learned.values.tolist()) <= {-1.0, 0.0, 1.0}  # trust is 0: outcomes alone
    assert learned.weights.sum().item() == pytest.approx(1)
    assert len(set(learned.weights.tolist())) <= 6
    # The one who moved last has won, or the board was full.
    assert learned.values[count - 1] >= 0


def test_self_play_draws_from_pythons_generator_alone() -> None:
    def played(seed: int) -> torch.Tensor:
        random.seed(seed)
        return self_play(3, ignorant, simulations=4, opening=6, trust=0.5).boards

    assert played(1).equal(played(1))
    assert not played(1)[:20].equal(played(2)[:20])


# The terminal.


def told(
    answers: list[str], network: Evaluate = ignorant, second: bool = False
) -> tuple[float | None, str]:
    """A game in which a person gives these answers, and then leaves by Ctrl-D."""
    console, given = Console(file=io.StringIO(), width=80), iter(answers)

    def ask(prompt: str) -> str:
        for answer in given:
            return answer
        raise EOFError

    worth = terminal.against_person(network, console, ask, second=second, simulations=2)
    assert isinstance(console.file, io.StringIO)
    return worth, console.file.getvalue()


def test_a_person_wins() -> None:
    worth, text = told(["1", "1", "1", "1"], hopeful(6))
    assert worth == 1
    assert "You have won." in text
    assert text.splitlines()[-3].startswith("● · ·")


def test_the_network_wins() -> None:
    worth, text = told(["1", "7", "1", "7"], hopeful(3), second=True)
    assert worth == -1
    assert "The network has won." in text


def test_moves_that_are_none_are_refused_in_words() -> None:
    worth, text = told(["8", "0", "-1", "[red]", "4444", "²", "", " 7 ", "q"])
    assert worth is None
    assert text.count("is no move; these are: 1, 2, 3, 4, 5, 6, 7") == 7
    assert "'[red]'" in text
    assert "You have left the game." in text


def test_leaving_by_the_end_of_input() -> None:
    worth, text = told([])
    assert worth is None
    assert "You have left the game." in text


def test_nobody_is_there_who_reads() -> None:
    assert told(["?"] * 1000)[0] is None


def test_a_terminal_that_knows_no_circles() -> None:
    told = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    terminal.show(after(3, 2), Console(file=told))
    told.seek(0)
    assert told.read().splitlines()[-2:] == [". . o x . . .", terminal.NUMBERS]


def test_a_full_column_is_refused() -> None:
    worth, text = told(["4", "4", "4", "4"], hopeful(3))  # the network takes the same column
    assert worth is None
    assert "'4' is no move; these are: 1, 2, 3, 5, 6, 7" in text


def test_the_network_against_itself() -> None:
    console = Console(file=io.StringIO(), width=80)
    worth = terminal.against_itself(hopeful(3), console, simulations=16)
    assert isinstance(console.file, io.StringIO)
    board, (moves, ending) = console.file.getvalue().splitlines()[:6], (
        console.file.getvalue().splitlines()[-2:]
    )  # fmt: skip
    columns = [int(column) - 1 for column in moves.removeprefix("moves: ").split()]
    state = after(*columns)
    assert state.is_terminal()
    assert outcome(state, 0) == worth
    assert sum(row.count("●") + row.count("○") for row in board) == len(columns)
    wanted = {1.0: "●, who began, has won.", 0.0: "A draw.", -1.0: "○ has won."}
    assert ending == wanted[worth]
