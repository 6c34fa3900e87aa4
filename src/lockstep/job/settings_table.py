"""Settings tables: the part of docs/job-files.md that is generated from the declarations.

    python -m lockstep.job.settings_table docs/job-files.md

writes them anew between their markers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lockstep.job.job import SETTINGS
from lockstep.job.settings import Setting

MARKERS = {True: "settings that change the numbers", False: "settings that do not"}
"""The name between the markers of each table, by `changes_numbers`."""


def fill_in(page: str) -> str:
    """The page with both tables as they are now.

    Raises:
        ValueError: the page has no markers for a table.
    """
    for changes_numbers, marker in MARKERS.items():
        before, begin, rest = page.partition(f"<!-- {marker} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end:
            raise ValueError(f"the page has no lines <!-- {marker} --> and <!-- end -->")
        page = "".join((before, begin, "\n", *_table(changes_numbers), "\n", end, after))
    return page


def _table(changes_numbers: bool) -> list[str]:
    rows = [
        _row(each) for each in SETTINGS.values() if each.declared.changes_numbers == changes_numbers
    ]
    return ["| setting | default | |\n", "|---|---|---|\n", *rows]


def _row(setting: Setting) -> str:
    declared = setting.declared
    choices = ", ".join(f"`{choice}`" for choice in setting.choices)
    parts = (declared.help, choices and f"One of {choices}.", declared.detail)
    text = " ".join(part for part in parts if part)
    return f"| `{setting.name}` | {setting.default_text or '–'} | {text} |\n"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(fill_in(path.read_text(encoding="utf-8")), encoding="utf-8")
