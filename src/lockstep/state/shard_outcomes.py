"""Shard outcomes: a shard's loss and what the task logs beside it, in the control segment.

The values of a step lie in the ring buffer, in the order of their names. The names are the same in
every step, so each shard has them once. They count by the length that goes with a step's loss,
which is written last: a worker that is killed in between leaves nothing that anybody reads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from lockstep.errors import TaskError
from lockstep.state.control_segment import MOST_LOGGED, NAMES_BYTES, RING, ControlSegment

FIX = "return the same names for every batch, with a NaN where there is no value"


class ShardOutcome(NamedTuple):
    """What the forward pass of a shard gave beside its gradient."""

    loss: float
    logged: Mapping[str, float]
    """The means over the shard's samples, by name."""


NOTHING = ShardOutcome(0.0, {})
"""The outcome of a shard without samples."""


def write_outcome(control: ControlSegment, step: int, shard: int, outcome: ShardOutcome) -> None:
    """Record a shard's outcome for a step.

    Raises:
        TaskError: the names are not those of the steps before.
    """
    place, text = step % RING, b""
    if outcome.logged:
        names = sorted(outcome.logged)
        text = encode_names(names)
        control.logged[place, shard, : len(names)] = [outcome.logged[name] for name in names]
    if outcome is not NOTHING and (text or control.names_kept[shard]):
        _keep_names(control, step, shard, text)
    control.outcomes[place, shard] = (outcome.loss, len(outcome.logged), len(text))


def _keep_names(control: ControlSegment, step: int, shard: int, text: bytes) -> None:
    """Keep the names of a shard the first time, and compare them from then on."""
    kept = int(control.names_kept[shard])
    if not kept:
        control.names[shard, : len(text)] = list(text)
        control.names_kept[shard] = len(text)
        return
    before = control.names[shard, :kept].tobytes()
    if before != text:
        raise TaskError(
            f"Task.loss returned other values beside the loss at step {step} than before",
            expected=_listed(before),
            found=_listed(text),
            fix=FIX,
        )


def names_of(control: ControlSegment, step: int, shard: int) -> bytes:
    """The names that a shard's values of a step have, as `encode_names` gives them; none: b""."""
    return control.names[shard, : control.names_bytes[step % RING, shard]].tobytes()


def recorded_outcome(control: ControlSegment, step: int, shard: int) -> ShardOutcome:
    """A shard's outcome, as it was recorded for a step."""
    place = step % RING
    names = decode_names(names_of(control, step, shard))
    values = control.logged[place, shard, : len(names)].tolist()
    return ShardOutcome(float(control.losses[place, shard]), dict(zip(names, values, strict=True)))


def check_agreement(control: ControlSegment, step: int, shards: Sequence[int]) -> None:
    """Check that the task has logged the same for all of these shards.

    Raises:
        TaskError: it has not.
    """
    if not control.names_bytes[step % RING].any():
        return
    texts = {shard: names_of(control, step, shard) for shard in shards}
    first = texts[shards[0]]
    for shard, text in texts.items():
        if text != first:
            raise TaskError(
                f"Task.loss returned other values beside the loss for shard {shard} of step {step} "
                f"than for shard {shards[0]}",
                expected=_listed(first),
                found=_listed(text),
                fix=FIX,
            )


def weighted_means(
    control: ControlSegment, step: int, weights: Sequence[float]
) -> tuple[float, dict[str, float]]:
    """The loss of a step, and what was logged: means over its samples, in the order of the shards.

    `weights`: each shard's share of the samples.
    """
    place, loss, named = step % RING, 0.0, 0
    for (value, _, length), weight in zip(control.outcomes[place].tolist(), weights, strict=True):
        loss += value * weight
        named += length
    if not named:
        return loss, {}
    active = [shard for shard, weight in enumerate(weights) if weight]
    check_agreement(control, step, active)
    means: dict[str, float] = {}
    for number, name in enumerate(decode_names(names_of(control, step, active[0]))):
        means[name] = 0.0
        for shard in active:
            means[name] += float(control.logged[place, shard, number]) * weights[shard]
    return loss, means


def encode_names(names: Sequence[str]) -> bytes:
    """Names as bytes, as few as the control segment has room for.

    Raises:
        TaskError: they are too many, or too long.
    """
    text = json.dumps(list(names)).encode()
    if len(names) > MOST_LOGGED or len(text) > NAMES_BYTES:
        raise TaskError(
            "Task.loss returned too many values beside the loss",
            expected=f"at most {MOST_LOGGED}, with names of {NAMES_BYTES} characters together",
            found=f"{len(names)}, with {len(text)} characters",
            fix="log fewer, or shorten their names",
        )
    return text


def decode_names(text: bytes) -> list[str]:
    """The names in such bytes.

    Raises:
        ValueError: there are none, or too many.
    """
    try:
        names = json.loads(text) if text else []
    except RecursionError as error:
        raise ValueError("no list of names") from error
    if not isinstance(names, list) or len(names) > MOST_LOGGED:
        raise ValueError("no list of names")
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError("names that are none, or come twice")
    return names


def _listed(text: bytes) -> str:
    return _joined(decode_names(text)) or "none"


def _joined(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
