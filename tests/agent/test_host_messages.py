"""Messages between agents and their master: what cannot be is refused, with a reason."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lockstep.agent
from lockstep.agent.host_messages import (
    AGENT_EVENTS,
    FROM_AGENTS,
    FROM_MASTER,
    AgentFailed,
    BatchChunk,
    EventForwarded,
    ExchangeTrouble,
    HostMeasured,
    HostPaused,
    HostPresent,
    HostReady,
    HostRefused,
    InferBatches,
    JobEnded,
    LeaseExtended,
    LinkProbe,
    LinkProbed,
    MeasureHost,
    PauseWorkers,
    PlanAssigned,
    Recovered,
    ResumeWorkers,
    SendState,
    StepRecorded,
)
from lockstep.agent.job_offer import OFFER, JobOffer, RecordsRequest
from lockstep.agent.regroup_messages import HostStatus, RegroupOrder
from lockstep.errors import JobError, ProtocolError
from lockstep.net.blob_transfer import BlobInfo
from lockstep.net.control_link import FetchPiece, Heartbeat
from lockstep.planning.job_profile import JobProfile, Measurement, ShardTime, StateMemory
from lockstep.system.messages import Codec, ErrorMessage, Message, encode
from tests.support.fuzzing import ended, fuzz
from tests.support.message_values import ODD, body, fields_of, nested, refuses

ERROR = ErrorMessage.of(JobError("no such task", expected="one", found="none", fix="write it"))
ADDRESSES = {"a": ("127.0.0.1", 4000), "b": ("127.0.0.1", 4001)}
ORDER = RegroupOrder(
    step=3, workers={"a": 1, "b": 2}, addresses=ADDRESSES,
    actions={"a": "keep", "b": "copy"}, source="a",
)  # fmt: skip
MEASURED = Measurement(
    workers=2, shards=(ShardTime(samples=8, seconds=0.5),), own=ShardTime(samples=8, seconds=0.5),
    traced=False, sum_seconds=0.1, optimizer_seconds=0.1, rest_seconds=-0.1, steps=3, copy_rate=1e9,
    worker_bytes=1 << 20,
)  # fmt: skip
PROFILE = JobProfile(alone=MEASURED, busy=MEASURED, memory=StateMemory(state=64, slot=64, slots=4))
AGENTS: tuple[Message, ...] = (
    HostPresent(workers=2, facts={"torch": "2"}, train_samples=100, eval_samples=0),
    LinkProbed(number=3),
    HostMeasured(profile=PROFILE, memory=1 << 30),
    HostReady(workers=2),
    HostPaused(
        generation=1, status=HostStatus(whole=3, snapshot=None, address=("127.0.0.1", 4000))
    ),
    ExchangeTrouble(generation=1, other="b", why="it closed the connection"),
    StepRecorded(step=4, digest="0f"),
    EventForwarded(name="died", fields={"worker": 1, "how": "was killed"}),
    Recovered(recoveries=[{"step": 3, "stalled_ms": 2.5}]),
    AgentFailed(error=ERROR, step=2),
    BatchChunk(round=1, batch=0, chunk=0, chunks=1, text="{}"),
    Heartbeat(),
    FetchPiece(blob="code", piece=0),
)
MASTER: tuple[Message, ...] = (
    LinkProbe(number=3, content=b"x" * 100),
    MeasureHost(plan={"workers": 1}, job="0f" * 16, all_sizes=True),
    PlanAssigned(plan={"workers": 1}),
    HostRefused(error=ERROR),
    PauseWorkers(generation=2),
    ResumeWorkers(order=ORDER, lease=9),
    LeaseExtended(step=9),
    InferBatches(what="evaluate", round=1, step=9, batches=[0, 2]),
    SendState(step=9),
    JobEnded(),
)
SAID: list[tuple[Codec[Any], Message]] = [
    *((FROM_AGENTS, message) for message in AGENTS),
    *((FROM_MASTER, message) for message in MASTER),
    (
        OFFER,
        JobOffer(
            job="job", master="a", address=("127.0.0.1", 9), task="mnist", args={"x": 1.5},
            code=BlobInfo(digest="ab" * 32, nbytes=9), data=BlobInfo(digest="cd" * 32, nbytes=9),
            records=RecordsRequest(path="p", keep=["x"]),
        ),
    ),
]  # fmt: skip


WRONG_COSTS: tuple[dict[str, Any], ...] = (
    {"rest_seconds": math.nan}, {"rest_seconds": math.inf}, {"sum_seconds": -1.0}, {"workers": 0},
    {"shards": []}, {"own": {"samples": 0, "seconds": 1.0}},
    {"own": {"samples": 1, "seconds": math.nan}}, {"copy_rate": "1"},
)  # fmt: skip


def changed_profile(**change: object) -> dict[str, Any]:
    """A profile with something wrong in it."""
    profile: dict[str, Any] = msgspec.to_builtins(PROFILE)
    return {**profile, "alone": {**profile["alone"], **change}}


def name_of(value: object) -> str:
    return type(value).__name__


@pytest.mark.parametrize(("codec", "message"), SAID, ids=name_of)
def test_what_is_right_comes_as_it_was_sent(codec: Codec[Any], message: Message) -> None:
    assert codec.decode(encode(message)) == message


@pytest.mark.parametrize(("codec", "message"), SAID, ids=name_of)
def test_unknown_fields_operations_and_nests(codec: Codec[Any], message: Message) -> None:
    fields = fields_of(message)
    for wrong in (
        {**fields, "more": 1},
        {**fields, "op": "Other\x1b[2J"},
        {**fields, "op": 5},
        [fields],
        {**fields, "op": nested(500)},
    ):
        refuses(codec, body(wrong))
    for name in fields.keys() - {"op"}:
        refuses(codec, body({**fields, name: nested(500)}))
        refuses(codec, body({**fields, name: {1: 2}}))


@pytest.mark.parametrize(
    ("codec", "op", "change"),
    [
        (FROM_AGENTS, "HostPresent", {"workers": 0}),
        (FROM_AGENTS, "HostPresent", {"workers": True}),
        (FROM_AGENTS, "HostPresent", {"train_samples": 2**60}),
        (FROM_AGENTS, "HostPresent", {"facts": ["torch"]}),
        (FROM_AGENTS, "HostPresent", {"facts": {"torch": "\x1b[2J"}}),
        (FROM_AGENTS, "HostPresent", {"facts": {str(n): "" for n in range(300)}}),
        (FROM_AGENTS, "HostPaused", {"status": {"op": "HostStatus", "whole": "7", "snapshot": 1}}),
        (
            FROM_AGENTS,
            "HostPaused",
            {"status": {"op": "HostStatus", "whole": 2**62, "snapshot": 1}},
        ),
        (FROM_AGENTS, "HostPaused", {"generation": -1}),
        (FROM_AGENTS, "LinkProbed", {"number": -1}),
        (FROM_AGENTS, "HostMeasured", {"memory": -1}),
        *(
            (FROM_AGENTS, "HostMeasured", {"profile": changed_profile(**change)})
            for change in WRONG_COSTS
        ),
        (FROM_MASTER, "LinkProbe", {"content": bytes(1 << 20)}),
        (FROM_MASTER, "MeasureHost", {"job": "../../x"}),
        (FROM_AGENTS, "ExchangeTrouble", {"why": "x" * 100_000}),
        (FROM_AGENTS, "StepRecorded", {"step": 1.5}),
        (FROM_AGENTS, "StepRecorded", {"digest": "\n"}),
        (FROM_AGENTS, "EventForwarded", {"name": "baseline"}),
        (FROM_AGENTS, "EventForwarded", {"fields": {"time": "1970-01-01"}}),
        (FROM_AGENTS, "EventForwarded", {"fields": {"event": "evaluated"}}),
        (FROM_AGENTS, "EventForwarded", {"fields": {"loss": math.nan}}),
        (FROM_AGENTS, "EventForwarded", {"fields": {"raw": b"x"}}),
        (FROM_AGENTS, "Recovered", {"recoveries": [{}] * 2000}),
        (FROM_AGENTS, "BatchChunk", {"chunks": 10**9}),
        (FROM_AGENTS, "FetchPiece", {"blob": "/etc/passwd"}),
        (FROM_AGENTS, "FetchPiece", {"piece": -1}),
        (FROM_MASTER, "PauseWorkers", {"generation": 10**30 % 2**63}),
        (FROM_MASTER, "LeaseExtended", {"step": 2**62}),
        (FROM_MASTER, "InferBatches", {"what": "train"}),
        (FROM_MASTER, "InferBatches", {"batches": [0, -1]}),
        (OFFER, "JobOffer", {"address": ["127.0.0.1", math.inf]}),
        (OFFER, "JobOffer", {"address": ["127.0.0.1", 0]}),
        (OFFER, "JobOffer", {"args": {"x": math.inf}}),
        (OFFER, "JobOffer", {"args": {"x": nested(900)}}),
        (OFFER, "JobOffer", {"job": "\x1b]0;x\x07"}),
        (OFFER, "JobOffer", {"job": ""}),
        (OFFER, "JobOffer", {"data": {"op": "BlobInfo", "digest": "ab" * 32, "nbytes": 0}}),
        (OFFER, "JobOffer", {"data": {"op": "BlobInfo", "digest": "../x", "nbytes": 1}}),
    ],
)
def test_values_that_cannot_be(codec: Codec[Any], op: str, change: dict[str, Any]) -> None:
    (message,) = (each for _, each in SAID if type(each).__name__ == op)
    why = refuses(codec, body({**fields_of(message), **change}))
    assert "expected" in why


def test_a_lone_surrogate() -> None:
    offer = JobOffer(job="\ud800", master="a", address=("127.0.0.1", 9), task="mnist")
    with pytest.raises(ProtocolError, match="cannot be sent"):
        encode(offer)
    right = encode(JobOffer(job="abc", master="a", address=("127.0.0.1", 9), task="mnist"))
    refuses(OFFER, right.replace(b"abc", b"\xed\xa0\x80"))


@fuzz(300)
@given(st.sampled_from(SAID), st.data())
def test_random_values_in_valid_messages(
    said: tuple[Codec[Any], Message], data: st.DataObject
) -> None:
    """They are refused, or are within bounds: then what was taken is what was sent."""
    codec, message = said
    fields = fields_of(message)
    target: Any = fields
    name: Any = data.draw(st.sampled_from(sorted(target)))
    while isinstance(target[name], dict | list) and target[name] and data.draw(st.booleans()):
        target = target[name]
        name = data.draw(st.sampled_from(sorted(target) if isinstance(target, dict)
                                         else range(len(target))))  # fmt: skip
    target[name] = data.draw(ODD)
    try:
        found = codec.decode(body(fields))
    except ProtocolError as error:
        ended(error)
    else:
        assert codec.decode(encode(found)) == found
        ended("within bounds")


@fuzz(300)
@given(st.sampled_from(SAID), st.integers(0, 2**16), st.integers(1, 255), st.integers(0, 2**16))
def test_altered_bytes_in_valid_messages(
    said: tuple[Codec[Any], Message], place: int, change: int, cut: int
) -> None:
    codec, message = said
    raw = bytearray(encode(message))
    raw[place % len(raw)] ^= change
    for content in (bytes(raw), bytes(raw[: cut % len(raw)])):
        try:
            codec.decode(content)
        except ProtocolError as error:
            ended(error)
        else:
            ended("within bounds")


def test_errors_of_others_can_be_shown() -> None:
    sent = ErrorMessage(kind="JobError", what="a\x1b[2Jb\rc\n  d\u202e", found="\x9b1m")
    error = sent.error()
    assert type(error) is JobError
    assert error.what == "a\\x1b[2Jb\\rc\n  d\\u202e"
    assert error.found == "\\x9b1m"
    assert ErrorMessage(kind="SystemExit", what="x").error().exit_code == 1


def test_every_event_of_an_agent_can_be_forwarded() -> None:
    """All but the baseline, which only the master computes."""
    assert lockstep.agent.__file__ is not None
    source = "".join(path.read_text() for path in Path(lockstep.agent.__file__).parent.glob("*.py"))
    found = set(re.findall(r'observer\.event\(\s*"(\w+)"', source))
    assert len(found) > 8
    assert found - {"baseline"} <= AGENT_EVENTS
