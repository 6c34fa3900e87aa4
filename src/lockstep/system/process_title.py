"""Process titles: what `ps` and `top` show of each process of a run.

A title takes the place of the command line, and never of the environment behind it in memory: tools
read that, too.
"""

from __future__ import annotations

import os

os.environ["SPT_NOENV"] = "1"  # read once, when the title is first touched
try:
    import setproctitle

    setproctitle.getproctitle()
finally:
    del os.environ["SPT_NOENV"]

_of = ""


def set_title(role: str, job: str | None = None) -> None:
    """Say what this process is: `lockstep worker 1 of mnist`.

    `job` is remembered for the process and its forks.
    """
    global _of
    if job is not None:
        _of = f" of {job}"
    setproctitle.setproctitle(f"lockstep {role}{_of}")
