"""Answers in pieces."""

from __future__ import annotations

import math
from typing import Any

import pytest

from lockstep.agent import answer_chunks as pieces
from lockstep.agent.answer_chunks import PIECE, AnswerAssembler, in_pieces
from lockstep.errors import TaskError
from lockstep.net.frames import Kind, message_frame

LONG = {"text": '"\\é' * PIECE, "nothing": math.nan, "infinite": -math.inf}


def add(taken: AnswerAssembler, host: str, number: int, piece: dict[str, Any]) -> Any:
    return taken.add(host, {"round": number, **piece})


def test_pieces_are_put_together_whoever_sends_at_the_same_time() -> None:
    taken = AnswerAssembler()
    taken.begin(3)
    long, short = list(in_pieces(7, LONG)), list(in_pieces(8, [1.5]))
    assert (len(long), len(short)) == (11, 1)
    for piece in long[:-1]:
        assert add(taken, "b", 3, piece) is None
        assert add(taken, "c", 3, piece) is None
    assert add(taken, "b", 3, short[0]) == {"round": 3, "batch": 8, "result": [1.5]}
    found = add(taken, "b", 3, long[-1])["result"]
    assert found["text"] == LONG["text"]
    assert math.isnan(found["nothing"])
    assert found["infinite"] == -math.inf


def test_a_piece_fits_into_a_message_whatever_is_in_it() -> None:
    for text in ('"' * PIECE, "\\" * PIECE, "é" * PIECE, "\x00" * PIECE):
        for piece in in_pieces(1, text):
            message_frame(Kind.CONTROL, {"op": "batch", "round": 2**40, **piece})


def test_what_comes_of_an_earlier_round_is_passed_over() -> None:
    taken = AnswerAssembler()
    whole = list(in_pieces(7, LONG))
    taken.begin(1)
    add(taken, "b", 1, whole[0])
    taken.begin(2)
    assert add(taken, "b", 1, whole[1]) is None
    for piece in whole[:-1]:
        add(taken, "b", 2, piece)
    assert add(taken, "b", 2, whole[-1])["batch"] == 7


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"round": 1},
        {"round": 1, "batch": [], "piece": 0, "pieces": 1, "text": "1"},
        {"round": 1, "batch": 1, "piece": 1, "pieces": 2, "text": "1"},
        {"round": 1, "batch": 1, "piece": 0, "pieces": 0, "text": "1"},
        {"round": 1, "batch": 1, "piece": 0, "pieces": 10**9, "text": "1"},
        {"round": 1, "batch": 1, "piece": 0, "pieces": "1", "text": "1"},
        {"round": 1, "batch": 1, "piece": 0, "pieces": 1, "text": "{"},
    ],
)
def test_what_is_no_piece(message: dict[str, Any]) -> None:
    taken = AnswerAssembler()
    taken.begin(1)
    with pytest.raises((KeyError, TypeError, ValueError)):
        taken.add("b", message)


def test_what_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MOST_PIECES", 2)
    assert len(list(in_pieces(0, "x" * (2 * PIECE - 2)))) == 2
    with pytest.raises(TaskError, match="too long to be sent") as raised:
        next(in_pieces(0, "x" * (2 * PIECE)))
    assert raised.value.found == f"{2 * PIECE + 2:,}"
