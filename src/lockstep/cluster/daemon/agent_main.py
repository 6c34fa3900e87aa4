"""Agent process: `python -m lockstep.cluster.daemon.agent_main`, with an `AgentOrder` on stdin.

To whoever started the process stdout tells that the agent has taken part in a step (`MOVED`), and
why it has ended, as an `ErrorMessage`. All else that is printed, by the user's code as well, goes
to stderr.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from lockstep.cluster.daemon.agent_processes import MOVED, ORDER, AgentOrder
from lockstep.errors import LockstepError
from lockstep.net.identity import Identity
from lockstep.system.messages import ErrorMessage, encode, printable
from lockstep.system.processes import die_with_parent


def main() -> int:
    """Take part in the job that stdin describes; returns the process's exit code."""
    answers = os.dup(1)  # not inherited by workers
    os.dup2(2, 1)
    signal.signal(signal.SIGTERM, _end)
    said = sys.stdin.buffer.read()
    if not said:
        return 1  # who wanted to give the order is dead
    order = ORDER.decode(said)
    die_with_parent(order.parent)
    try:
        _serve(order, lambda: os.write(answers, MOVED))
    except LockstepError as error:
        os.write(answers, encode(ErrorMessage.of(error)))
        return error.exit_code
    return 0


def _serve(order: AgentOrder, moved: Callable[[], object]) -> None:
    identity = Identity.load(Path(os.fsdecode(order.identity)))
    from lockstep.agent.agent import serve
    from lockstep.net.counted_report import CountedReport

    serve(
        identity,
        order.offer,
        workers=order.workers,
        host=order.host,
        report=CountedReport(report),
        folder=Path(os.fsdecode(order.folder)) if order.folder else None,
        moved=moved,
        functions=order.functions,
        discreet=order.discreet,
    )


def report(who: str, why: str) -> None:
    """Print what became of a connection."""
    print(printable(f"lockstep: {who}: {why}"), file=sys.stderr, flush=True)


def _end(number: int, _: FrameType | None) -> None:
    """Leave by way of everything that has to be closed."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
