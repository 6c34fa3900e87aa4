"""What a process tells of an error: Lockstep's own as it is, the user's from the user's code on."""

from __future__ import annotations

import errno
import os
import traceback
from pathlib import Path

from lockstep.device.determinism import nondeterministic_operation, not_deterministic
from lockstep.errors import LockstepError, ResourceError, TaskError
from lockstep.system.messages import ErrorMessage


def user_traceback(error: BaseException) -> str:
    """The traceback without the frames above the user's code."""
    here = str(Path(__file__).parents[1]) + os.sep
    recipes = os.path.join(here, "recipes") + os.sep
    frames = error.__traceback__
    while frames is not None and frames.tb_next is not None:
        file = frames.tb_frame.f_code.co_filename
        own = file.startswith(here) and not file.startswith(recipes)
        if not own and not file.startswith("<frozen importlib"):
            break
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames)).rstrip()


def describe_error(error: BaseException, doing: str) -> ErrorMessage:
    """An error as a message: Lockstep's own as it is, the user's with its traceback."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        error = ResourceError(
            f"there is no file descriptor left: {error}",
            expected="room for the run's own, and for those of the task",
            fix="allow more, with ulimit -n",
        )
    if type(error).__name__ == "OutOfMemoryError":  # torch's; it need not be loaded here
        error = ResourceError(
            f"the GPU has no memory left while {doing}",
            expected="memory for the state twice, a gradient a shard, and what a shard computes",
            found=str(error).splitlines()[0],
            fix="use more shards, so that each is smaller, or a GPU that nobody else uses",
        )
    if not isinstance(error, LockstepError):
        text = user_traceback(error)
        operation = nondeterministic_operation(error)
        if operation is not None:
            error = not_deterministic(operation, f"while {doing}\n\n{text}\n")
        else:
            error = TaskError(f"the task raised an error while {doing}\n\n{text}\n")
    return ErrorMessage.of(error)
