"""Admission: which jobs a host takes. Pure, but for a look at which modules there are.

An offer names a task that the host looks up by itself, and calls with arguments of the offer. Any
function of any module can be named so: a host takes recipes, and else only what it was told to.
Code that the master sends is known by its digest alone: what it is called says nothing.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lockstep.agent.job_offer import JobOffer
from lockstep.errors import JobError, LockstepError
from lockstep.job.code_archive import MAX_BYTES
from lockstep.job.offered_names import is_plain
from lockstep.net.blob_transfer import BlobInfo


@dataclass(frozen=True, kw_only=True)
class Allowed:
    """Which tasks besides recipes may run on a host."""

    modules: tuple[str, ...] = ()
    """Modules that are installed here, each with the modules in it, whose Tasks may run; or whole
    names of Tasks, or of functions that return a job."""
    code: tuple[str, ...] = ()
    """Digests of archives that a master may send."""
    data: tuple[str, ...] = ()
    """Folders whose files recipes may be given, by a path of this host."""


def refusal(offer: JobOffer, allowed: Allowed, name: str) -> LockstepError | None:
    """Why the host of this name does not take a job; None if it does."""
    if not is_plain(offer.task) and not offer.task.rpartition(":")[0].endswith(".py"):
        return JobError(
            f"host {name} does not take the task {offer.task!a}",
            expected="a recipe, or module:Task, of identifiers with dots between them",
            found="something else in its name",
            fix="name it as one does in Python",
        )
    if offer.code is not None:
        return _code_refusal(offer, offer.code, allowed.code, name)
    module, colon, _ = offer.task.rpartition(":")
    if not colon:
        return _files_refusal(offer, allowed.data, name)
    if module.endswith(".py"):
        return JobError(
            f"host {name} does not take the task {offer.task!a}",
            expected="a recipe, or module:Task of a module that every host has",
            found="the path of a file, which is on the master's host",
            fix="put the file into a package that is installed on every host, or ship it: "
            "lockstep run --ship-code",
        )
    if not any(_covers(each, offer.task, module) for each in allowed.modules):
        top = module.partition(".")[0]
        return JobError(
            f"host {name} does not take the task {offer.task!a}",
            expected=f"a recipe, or a task of: {_listed(allowed.modules)}",
            found=f"the module {module!a}",
            fix=f"if its code may run there: lockstep join --allow {top}",
        )
    if _missing(module):
        return JobError(
            f"host {name} has no module {module!a}",
            expected="the same code on every host",
            found="none in the folder of its `lockstep join` and on its Python path",
            fix="install it there, or start `lockstep join` in the folder that holds it",
        )
    return None


NAMES_OF_NO_FILE = frozenset({"model", "label"})
"""Arguments of recipes that are texts, and no paths."""


def _files_of(offer: JobOffer) -> list[object]:
    """What may be the path of a file among the arguments of a recipe's offer."""
    return [
        value
        for name, value in offer.args.items()
        if name not in NAMES_OF_NO_FILE and not isinstance(value, int | float | None)
    ]


def names_files(offer: JobOffer) -> bool:
    """Whether an offer has a recipe read files of this host."""
    return ":" not in offer.task and bool(_files_of(offer))


def _files_refusal(offer: JobOffer, folders: Sequence[str], name: str) -> LockstepError | None:
    """Why a recipe does not run on files of this host; None if it names none, or may."""
    for value in _files_of(offer):
        path = Path(value).resolve() if isinstance(value, str) and "\0" not in value else None
        if path is None or not any(path.is_relative_to(Path(each).resolve()) for each in folders):
            return JobError(
                f"host {name} does not take the recipe {offer.task!a} on a file of its own",
                expected=f"a path below: {', '.join(folders) or '(no folder is allowed)'}",
                found=f"{value!a}"[:200],
                fix="if its files may be read by jobs of others: lockstep join --data FOLDER",
            )
    return None


def may_call(offer: JobOffer, allowed: Allowed) -> bool:
    """Whether what an offer names may be a function, which is called with the offer's arguments:
    where it was allowed by its full name, or all of the code was."""
    return ":" not in offer.task or offer.code is not None or offer.task in allowed.modules


def _code_refusal(
    offer: JobOffer, code: BlobInfo, allowed: Sequence[str], name: str
) -> LockstepError | None:
    what = f"host {name} does not take the code that is shipped with the task {offer.task!a}"
    if offer.task.rpartition(":")[0].endswith(".py"):
        return JobError(
            what,
            expected="module:Task, as `lockstep pack` prints it",
            found="the path of a file, which is not in the code",
        )
    if code.digest not in allowed:
        return JobError(
            what,
            expected=f"code that was allowed here: {_listed(allowed)}",
            found=f"digest {code.digest}",
            fix=f"`lockstep pack` with the task's name, where its sources are, says what is in it; "
            f"if it may run here: lockstep join --allow-code {code.digest}",
        )
    if code.nbytes > MAX_BYTES:
        return JobError(what, expected=f"at most {MAX_BYTES:,} bytes", found=f"{code.nbytes:,}")
    return None


def _listed(allowed: Sequence[str]) -> str:
    return ", ".join(allowed) or "(nothing is allowed)"


def _covers(allowed: str, task: str, module: str) -> bool:
    return allowed == task or module == allowed or module.startswith(f"{allowed}.")


def _missing(module: str) -> bool:
    """Whether a module's outermost package cannot be found. Imports nothing."""
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is None
    except (ImportError, ValueError):
        return True
