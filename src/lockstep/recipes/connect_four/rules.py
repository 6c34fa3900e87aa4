"""Rules: Connect Four by OpenSpiel, and the planes that a network sees of a state.

A state is a `pyspiel.State`: `legal_actions()` are columns from 0, player 0 has the
stones x and begins, `returns()` are 1, 0 or -1 for each of the two players.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lockstep.errors import DataError

ROWS, COLUMNS = 6, 7

State = Any
"""A `pyspiel.State`, which has no types of its own."""


def new_game() -> State:
    """The empty board.

    Raises:
        DataError: OpenSpiel is not installed.
    """
    try:
        import pyspiel
    except ImportError:
        raise DataError(
            "Connect Four needs OpenSpiel for its rules",
            expected="the package open-spiel",
            found="no such package",
            fix="pip install 'lockstep-dlp[games]'",
        ) from None
    return pyspiel.load_game("connect_four").new_initial_state()


def planes(states: Sequence[State]) -> torch.Tensor:
    """The stones of the player to move and of the other, as planes `[n, 2, 6, 7]` (float32).

    The first row is the top one.
    """
    # The fastest way to get a board is its text: six lines of seven characters.
    text = "".join(map(str, states)).encode()
    boards = np.frombuffer(text, np.uint8).reshape(len(states), ROWS, COLUMNS + 1)[:, :, :COLUMNS]
    second = np.array([state.current_player() == 1 for state in states])[:, None, None]
    crosses, noughts = boards == ord("x"), boards == ord("o")
    own, other = np.where(second, noughts, crosses), np.where(second, crosses, noughts)
    return torch.from_numpy(np.stack([own, other], axis=1).astype(np.float32))


def outcome(state: State, player: int) -> float:
    """The outcome of a finished game for a player: 1 for a win, -1 for a loss, 0 for a draw."""
    return float(state.returns()[player])
