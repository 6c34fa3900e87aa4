"""Loss form: what `Task.loss` may return, a loss, or a loss and what is to be logged beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def split_loss(returned: Any) -> tuple[Any, Mapping[str, Any]]:
    """The loss, and the values beside it: `(loss, {"accuracy": ...})`, or the loss alone.

    Any other pair is taken for a loss, which it is not: whoever checks the loss refuses it.
    """
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        return returned
    return returned, {}
