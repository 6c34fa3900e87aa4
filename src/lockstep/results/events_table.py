"""Events table: the part of docs/events.md that is generated from the schema.

    python -m lockstep.results.events_table docs/events.md

writes it anew between its markers.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from lockstep.results.event_schema import BY_NAME, Event

BEGIN, END = "<!-- events -->\n", "<!-- end -->"


def fill_in(page: str) -> str:
    """The page with the table as it is now.

    Raises:
        ValueError: the page has no markers for it.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page has no lines {BEGIN.strip()} and {END}")
    rows = [_row(name, kind) for name, kind in BY_NAME.items()]
    head = ["| event | fields | what happened |\n", "|---|---|---|\n"]
    return "".join((before, begin, "\n", *head, *rows, "\n", end, after))


def _row(name: str, kind: type[Event]) -> str:
    own = [field for field in kind.__struct_fields__ if field not in Event.__struct_fields__]
    fields = ", ".join(f"`{field}`" for field in own) or "–"
    return f"| `{name}` | {fields} | {' '.join((inspect.getdoc(kind) or '').split())} |\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(fill_in(path.read_text(encoding="utf-8")), encoding="utf-8")
