"""Answers in chunks."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from lockstep.agent import answer_chunks
from lockstep.agent.answer_chunks import AnswerAssembler, BatchResult, check_result, in_chunks
from lockstep.agent.host_messages import CHUNK_CHARACTERS, FROM_AGENTS, BatchChunk
from lockstep.errors import ProtocolError, TaskError
from lockstep.net.frames import Kind, message_frame

LONG = {"text": '"\\é' * CHUNK_CHARACTERS, "nothing": math.nan, "infinite": -math.inf}


def test_chunks_are_put_together_whoever_sends_at_the_same_time() -> None:
    taken = AnswerAssembler()
    taken.begin(3)
    long, short = list(in_chunks(3, 7, LONG)), list(in_chunks(3, 8, [1.5]))
    assert (len(long), len(short)) == (11, 1)
    for chunk in long[:-1]:
        assert taken.add("b", chunk) is None
        assert taken.add("c", chunk) is None
    assert taken.add("b", short[0]) == BatchResult(round=3, batch=8, result=[1.5])
    whole = taken.add("b", long[-1])
    assert whole is not None
    found = whole.result
    assert found["text"] == LONG["text"]
    assert math.isnan(found["nothing"])
    assert found["infinite"] == -math.inf


def test_a_chunk_fits_into_a_message_whatever_is_in_it() -> None:
    for text in ('"', "\\", "é", "\x00"):
        for chunk in in_chunks(2**40, 1, text * CHUNK_CHARACTERS):
            frame = message_frame(Kind.CONTROL, chunk)
            assert FROM_AGENTS.decode(msgspec.msgpack.encode(chunk)) == chunk
            assert len(frame) < 1 << 20


def test_what_comes_of_an_earlier_round_is_passed_over() -> None:
    taken = AnswerAssembler()
    taken.begin(1)
    earlier, whole = list(in_chunks(1, 7, LONG)), list(in_chunks(2, 7, LONG))
    taken.add("b", earlier[0])
    taken.begin(2)
    assert taken.add("b", earlier[1]) is None
    for chunk in whole[:-1]:
        taken.add("b", chunk)
    found = taken.add("b", whole[-1])
    assert found is not None
    assert found.batch == 7


GOOD: dict[str, Any] = {"round": 1, "batch": 1, "chunk": 0, "chunks": 1, "text": "1"}


@pytest.mark.parametrize(
    "change",
    [
        {"op": "Other"},
        {"round": None},
        {"batch": []},
        {"chunk": 1, "chunks": 2},
        {"chunks": 0},
        {"chunks": 10**9},
        {"chunks": "1"},
        {"text": "{"},
        {"text": "[" * 100_000},
        {"more": 1},
    ],
)
def test_what_is_no_chunk(change: dict[str, Any]) -> None:
    taken = AnswerAssembler()
    taken.begin(1)
    body = msgspec.msgpack.encode({"op": "BatchChunk", **GOOD, **change})

    def take() -> None:
        message = FROM_AGENTS.decode(body)
        assert isinstance(message, BatchChunk)
        taken.add("b", message)

    with pytest.raises(ProtocolError):
        take()


def test_what_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer_chunks, "MAX_CHUNKS", 2)
    assert len(list(in_chunks(0, 0, "x" * (2 * CHUNK_CHARACTERS - 2)))) == 2
    with pytest.raises(TaskError, match="too long to be sent") as raised:
        next(in_chunks(0, 0, "x" * (2 * CHUNK_CHARACTERS)))
    assert raised.value.found == f"{2 * CHUNK_CHARACTERS + 2:,}"


SUMS: dict[str, Any] = {
    "batch": 3,
    "samples": 4,
    "sums": {"loss": 1.5, "correct": 2, "odd": math.nan},
    "outputs": {"score": {"kind": "tensor", "values": [1, 2.5]}},
}


def test_results_of_the_right_form() -> None:
    check_result("evaluate", "b", 3, SUMS)
    check_result("predict", "b", 3, [{"label": 1}, {}])


@pytest.mark.parametrize(
    ("what", "result"),
    [
        ("evaluate", None),
        ("evaluate", []),
        ("evaluate", {**SUMS, "batch": 4}),
        ("evaluate", {**SUMS, "samples": 0}),
        ("evaluate", {**SUMS, "sums": {"loss": "1"}}),
        ("evaluate", {**SUMS, "outputs": {"score": [1]}}),
        ("evaluate", {"batch": 3}),
        ("predict", {}),
        ("predict", [1]),
    ],
)
def test_results_of_another_form(what: Any, result: Any) -> None:
    with pytest.raises(ProtocolError, match="host b sends an answer for batch 3 that is none"):
        check_result(what, "b", 3, result)
