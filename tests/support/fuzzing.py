"""Inputs made at random: how many each test tries, and what became of them.

    python -m pytest --fuzz 3000

runs the fuzz tests alone, each with so many inputs, the same ones every time, and prints how those
ended. Without it each tries the few that it names.
"""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, settings

Test = TypeVar("Test", bound=Callable[..., None])
asked = 0
"""How many inputs `--fuzz` asks for; set before tests are imported."""
LIMIT_SECONDS = 3600
_ended: defaultdict[str, Counter[str]] = defaultdict(Counter)
_CONTENT = ("a hello", "a newcomer", "this is not a join token", "may not take part")
"""Errors that show what was found as it came: it would be another one each time."""


def fuzz(inputs: int) -> Callable[[Test], Test]:
    """Marks a test of Hypothesis that tries so many inputs, unless `--fuzz` says how many."""
    chosen = settings(
        max_examples=number(inputs), suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    return lambda test: pytest.mark.fuzz(chosen(test))


def number(inputs: int) -> int:
    """How many inputs a test tries that names so many."""
    return asked or inputs


def ended(how: object, inputs: int = 1) -> None:
    """Count inputs of the test that runs, by how they ended: an error, or words."""
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    _ended[test][reason(str(how))] += inputs


def reason(text: str) -> str:
    """An error's first line and what was found, without all that differs from input to input."""
    what, *rest = text.splitlines()
    found = "".join(
        line.partition("found:")[2] for line in rest if line.startswith("  found:")
    ).strip()
    if found and not any(part in what for part in _CONTENT):
        what = f"{what}: {found}"
    for pattern, plain in (
        (r"127\.0\.0\.1:\d+", "the client"),
        (r"\bb(['\"]).*\1", "other bytes"),
        (r"(that is not JSON|Errno \d+\]).*", r"\1"),
        (r"\b[A-Z]{5,}(?= with )", "one of kind N"),
        (r"(?<!TLS )(?<!TLS 1\.)\b(0x[0-9a-f]+|\d[\d,.]*)\b", "N"),
    ):
        what = re.sub(pattern, plain, what)
    return what


def table() -> list[str]:
    """What was counted, in Markdown: a line for each test, and for each way in which inputs ended
    there."""
    lines = ["| test | inputs | ended with |", "|---|---:|---|"]
    for test, ways in _ended.items():
        lines.append(f"| `{test}` | {sum(ways.values()):,} | |")
        lines += [f"| | {count:,} | {way} |" for way, count in ways.most_common()]
    lines.append(f"| all | {sum(map(Counter.total, _ended.values())):,} | |")
    return lines
