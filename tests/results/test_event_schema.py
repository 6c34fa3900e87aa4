"""The schema of events: what is written has its form, and readers take what they do not know."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import msgspec
import pytest

from lockstep.agent.host_messages import AGENT_EVENTS
from lockstep.results.event_schema import (
    BY_NAME,
    Died,
    Evaluated,
    Event,
    Formed,
    Unknown,
    name_of,
    parse_event,
)
from lockstep.results.events_table import fill_in
from lockstep.results.run_folder import Events, event_line
from tests.support.file_tree import ROOT, SOURCE

PAGE = ROOT / "docs" / "events.md"


def calls() -> list[tuple[str, str, set[str]]]:
    """Where the code tells of an event by name: the place, the event and the fields given."""
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr not in ("event", "add") or not node.args:
                continue
            said = ast.unparse(node.func)
            if not said.endswith(("observer.event", "self.event", "events.add")):
                continue
            if isinstance(node.args[0], ast.Constant):
                fields = {keyword.arg for keyword in node.keywords if keyword.arg}
                place = f"{path.relative_to(SOURCE)}:{node.lineno}"
                found.append((place, str(node.args[0].value), fields))
    return found


def test_every_event_that_the_code_tells_of_is_in_the_schema() -> None:
    found = calls()
    assert len(found) > 25
    for place, name, fields in found:
        assert name in BY_NAME, place
        assert fields <= set(BY_NAME[name].__struct_fields__), place
    assert set(AGENT_EVENTS) <= set(BY_NAME)


def test_the_table_in_the_documents_is_current() -> None:
    page = PAGE.read_text()
    assert fill_in(page) == page, "run: python -m lockstep.results.events_table docs/events.md"


@pytest.mark.parametrize("name", sorted(BY_NAME))
def test_every_field_has_a_default(name: str) -> None:
    """Older runs lack some."""
    event = parse_event(json.dumps({"time": "t", "event": name}).encode())
    assert type(event) is BY_NAME[name]
    assert event.time == "t"


def test_a_line_is_read_as_it_was_written() -> None:
    line = event_line("evaluated", {"step": 4, "data_epoch": 0, "metrics": {"loss": float("nan")}})
    event = parse_event(line.encode())
    assert isinstance(event, Evaluated)
    assert (event.step, event.metrics) == (4, {"loss": None})


def test_fields_of_later_versions_are_passed_over() -> None:
    event = parse_event(b'{"time":"t","event":"formed","seats":[0,2],"step":3,"more":{"x":1}}')
    assert isinstance(event, Formed)
    assert event.seats == [0, 2]


@pytest.mark.parametrize(
    "line",
    [b'{"time":"t","event":"landed","on":"moon"}', b'{"time":"t","event":"died","worker":"one"}'],
)
def test_what_is_not_known_is_kept_as_it_is(line: bytes) -> None:
    event = parse_event(line)
    assert isinstance(event, Unknown)
    assert name_of(event) == json.loads(line)["event"]
    assert event.fields


@pytest.mark.parametrize(
    "line", [b"", b"{", b"[]", b'"died"', b'{"time":"t"}', b'{"event":3}', b'\xff\xfe{"event":"x"}',
             b'{"time":"2026-01-01T00:00:00.000+00:00","event":"di', b"[" * 100_000]
)  # fmt: skip
def test_a_line_that_is_none(line: bytes) -> None:
    assert parse_event(line) is None


def test_a_torn_line_stays_a_line_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(event_line("note", {"text": "whole"}).encode() + b'{"time":"2026","event":"di')
    events = Events(path)
    events.add("died", worker=1)
    events.close()
    found = [parse_event(line) for line in path.read_bytes().splitlines()]
    assert [event is None for event in found] == [False, True, False]
    assert isinstance(found[-1], Died)


def strictly(line: bytes) -> Event:
    """An event of this version, whose fields are all in the schema."""
    fields = json.loads(line)
    kind = BY_NAME[fields["event"]]
    unknown = fields.keys() - set(kind.__struct_fields__) - {"event"}
    assert not unknown, (fields["event"], unknown)
    return msgspec.json.decode(line, type=kind)


def test_what_a_run_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose worker is killed and that is evaluated: each line has the form of the schema, and
    what the intervals tell adds up to the run."""
    import lockstep
    from lockstep.job.faults import Fault
    from tests.support.paced_task import PACE, Paced

    monkeypatch.setenv(PACE, "0.01")
    result = lockstep.run(
        Paced(), workers=2, data_epochs=5, batch_size=16, shards=4, out=tmp_path / "run",
        faults=(Fault(worker_id=1, step=9, phase="slot"),), quiet=True,
    )  # fmt: skip
    lines = (result.folder / "events.jsonl").read_bytes().splitlines()
    events = [strictly(line) for line in lines]
    by_name = {name: [e for e in events if name_of(e) == name] for name in BY_NAME}
    assert len(by_name["died"]) == 1
    assert name_of(events[0]) == "began"
    assert sum(e.steps for e in by_name["progressed"]) == result.steps  # type: ignore[attr-defined]
    told = sum(s.compute for e in by_name["timed"] for s in e.workers.values())  # type: ignore[attr-defined]
    assert told == pytest.approx(sum(row["compute"] for row in result.times.values()), rel=0.5)
    assert not (result.folder / "live.jsonl").exists()
