"""Event words: an event as a line for people."""

from __future__ import annotations

import msgspec

from lockstep.results import event_schema as kind
from lockstep.results.event_schema import Event
from lockstep.results.recoveries import describe_recovery

LONGEST = 400
"""Longer texts are cut."""


def describe_event(event: Event, master: str = "") -> str:
    """What happened, in words; for kinds without words of their own, their fields. The host of the
    master is not named."""
    text = _words(event, f" of {event.host}" if event.host not in (None, "", master) else "")
    text = text or _fields(event)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _words(event: Event, host: str) -> str:
    match event:
        case kind.Began():
            return f"{' '.join(event.command)}, pid {event.pid} on {event.host}"
        case kind.Resumed():
            return f"from the state after step {event.step:,}"
        case kind.Planned():
            tried = "" if event.measured is None else f", {event.measured * 1e3:.3g} ms in a trial"
            step = f"{(event.predicted or 0.0) * 1e3:.3g} ms a step predicted{tried}"
            return f"{event.chosen}, of {event.considered} considered: {step}"
        case kind.Note():
            return event.text
        case kind.Died():
            where = f"at step {event.step:,} ({event.phase})"
            return f"worker {event.worker}{host}, pid {event.pid}, {event.how} {where}"
        case kind.Recovered():
            fields = {name: getattr(event, name) for name in event.__struct_fields__}
            return describe_recovery(fields)
        case kind.Spawned():
            return f"worker {event.worker}{host}, pid {event.pid}: {event.reason}"
        case kind.Joined():
            return f"worker {event.worker}{host}, pid {event.pid}, is ready"
        case kind.Formed():
            seats = ", ".join(map(str, event.seats))
            return f"workers {seats}{host} go on from step {event.step:,}: {event.reason}"
        case kind.Dismissed():
            return f"worker {event.worker}{host}: {event.reason}"
        case kind.Evaluated():
            values = [
                f"{name} {'–' if value is None else format(value, '.4g')}"
                for name, value in event.metrics.items()
            ]
            return f"after step {event.step:,}: {', '.join(values)}"
        case kind.StoppedEarly():
            return f"after step {event.step:,}: {event.reason}"
        case kind.CallbackNoted():
            return event.note
        case kind.Requested():
            return f"scale to {event.number}" if event.request == "scale" else event.request
        case kind.Checkpointed():
            return f"after step {event.step:,}, in {event.seconds * 1e3:.0f} ms"
        case kind.Hosts():
            verb = "go on" if event.going_on else "pause"
            return f"{', '.join(event.hosts)} {verb}: {event.reason}"
        case kind.HostLost() | kind.Refused():
            return f"{event.host}: {event.why}"
        case kind.Finished():
            return f"{event.steps:,} steps, fingerprint {event.fingerprint[:16]}…"
        case kind.Ended():
            return f"{event.how} after step {event.step:,}: {event.why}"
        case kind.Verified():
            final = ", and the final state" if event.final else ""
            return f"steps {event.first}:{event.last} replayed, equal{final}"
        case kind.FirstStep():
            return "committed"
    return ""


def _fields(event: Event) -> str:
    if isinstance(event, kind.Unknown):
        fields = event.fields
    else:
        fields = {name: getattr(event, name) for name in event.__struct_fields__ if name != "time"}
    return "  ".join(
        f"{name} {value if isinstance(value, str) else msgspec.json.encode(value).decode()}"
        for name, value in fields.items()
        if value not in (None, "", [], {})
    )
