"""Answer chunks: what a host has made of a held-out batch, in messages of bounded length."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec

from lockstep.agent.host_messages import CHUNK_CHARACTERS, MAX_CHUNKS, BatchChunk
from lockstep.errors import ProtocolError, TaskError


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """What was made of a held-out batch."""

    round: int
    """Of questions: the one that this answers."""
    batch: int
    result: Any


def in_chunks(round_: int, batch: int, result: Any) -> Iterator[BatchChunk]:
    """The messages that tell what was made of a batch.

    Raises:
        TaskError: it is too long.
    """
    text = json.dumps(result)
    parts = [text[at : at + CHUNK_CHARACTERS] for at in range(0, len(text), CHUNK_CHARACTERS)]
    if len(parts) > MAX_CHUNKS:
        raise TaskError(
            "what the task makes of a held-out batch is too long to be sent to another host",
            expected=f"at most {MAX_CHUNKS * CHUNK_CHARACTERS:,} characters of JSON",
            found=f"{len(text):,}",
            fix="lower eval_batch_size, or return less from Task.outputs or Task.predict",
        )
    for index, part in enumerate(parts):
        yield BatchChunk(round=round_, batch=batch, chunk=index, chunks=len(parts), text=part)


class AnswerAssembler:
    """Puts the chunks together that hosts send, each its own in order."""

    def __init__(self) -> None:
        self._round = 0
        self._received: dict[tuple[str, int], list[str]] = {}
        """By host and batch."""

    def begin(self, number: int) -> None:
        """Batches are asked for in a new round; what comes of an earlier one is ignored."""
        self._round = number
        self._received.clear()

    def add(self, host: str, message: BatchChunk) -> BatchResult | None:
        """Take a chunk; the answer, if it was its last one.

        Raises:
            ProtocolError: it is not the next one, or the answer is none.
        """
        if message.round != self._round:
            return None
        received = self._received.setdefault((host, message.batch), [])
        if message.chunk != len(received):
            raise ProtocolError(
                f"host {host} sends chunk {message.chunk} of batch {message.batch}",
                expected=f"chunk {len(received)} of {message.chunks}",
            )
        received.append(message.text)
        if len(received) < message.chunks:
            return None
        del self._received[host, message.batch]
        result = _parse(host, "".join(received))
        return BatchResult(round=self._round, batch=message.batch, result=result)


def _parse(host: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(
            f"host {host} sends an answer that is not JSON", found=ascii(str(error))[:200]
        ) from error


class _Output(msgspec.Struct):
    kind: Literal["tensor", "list"]
    values: list[Any]


class _BatchSums(msgspec.Struct):
    """As `planning.eval_batches.BatchSums`."""

    batch: int
    samples: Annotated[int, msgspec.Meta(ge=1)]
    sums: dict[str, float]
    outputs: dict[str, _Output]


def check_result(what: Literal["evaluate", "predict"], host: str, batch: int, result: Any) -> None:
    """Check that a host's answer has the form that its batch's metrics or predictions have.

    Raises:
        ProtocolError: it has another.
    """
    try:
        if what == "predict":
            msgspec.convert(result, list[dict[str, Any]])
        elif msgspec.convert(result, _BatchSums).batch != batch:
            raise ValueError("the sums of another batch")
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise ProtocolError(
            f"host {host} sends an answer for batch {batch} that is none",
            expected="what the task makes of a batch",
            found=ascii(str(error))[:200],
        ) from error
