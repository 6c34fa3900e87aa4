"""Spelling: the known name that somebody probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def meant(word: str, known: Iterable[str]) -> str:
    """The known name that is most like a word; "" if none is like it."""
    return next(iter(difflib.get_close_matches(word.lower(), list(known), n=1)), "")
