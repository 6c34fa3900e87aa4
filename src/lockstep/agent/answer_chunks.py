"""Answers: what a host has made of a held-out batch, as messages of bounded length."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lockstep.errors import TaskError

PIECE = 400_000
"""Characters of JSON in a message: its quoting may double them, and a message has at most 1 MiB."""
MOST_PIECES = 1000


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """What was made of a held-out batch."""

    round: int
    """Of questions: the one that this answers."""
    batch: int
    result: Any


def in_pieces(batch: int, result: Any) -> Iterator[dict[str, Any]]:
    """The messages that tell what was made of a batch.

    Raises:
        TaskError: it is too long.
    """
    text = json.dumps(result)
    pieces = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
    if len(pieces) > MOST_PIECES:
        raise TaskError(
            "what the task makes of a held-out batch is too long to be sent to another host",
            expected=f"at most {MOST_PIECES * PIECE:,} characters of JSON",
            found=f"{len(text):,}",
            fix="lower eval_batch_size, or return less from Task.outputs or Task.predict",
        )
    for number, piece in enumerate(pieces):
        yield {"batch": batch, "piece": number, "pieces": len(pieces), "text": piece}


class AnswerAssembler:
    """Puts the pieces together that hosts send, each its own in order."""

    def __init__(self) -> None:
        self._round = 0
        self._begun: dict[tuple[str, int], list[str]] = {}
        """By host and batch, what has come."""

    def begin(self, number: int) -> None:
        """Batches are asked for in a new round; what comes of an earlier one is passed over."""
        self._round = number
        self._begun.clear()

    def add(self, host: str, message: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take a piece; `{"round", "batch", "result"}` if it was the last one of an answer.

        Raises:
            KeyError, TypeError, ValueError: it is no piece, or not the next one.
        """
        if message["round"] != self._round:
            return None
        batch, number, pieces = message["batch"], message["piece"], message["pieces"]
        begun = self._begun.setdefault((host, batch), [])
        if number != len(begun) or not 1 <= pieces <= MOST_PIECES:
            raise ValueError(f"piece {number!r} of {pieces!r} after {len(begun)}")
        begun.append(str(message["text"]))
        if len(begun) < pieces:
            return None
        del self._begun[host, batch]
        return {"round": self._round, "batch": batch, "result": json.loads("".join(begun))}
