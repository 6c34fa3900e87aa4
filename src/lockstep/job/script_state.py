"""Script state: what a script has set in modules before it starts a run, for the forkserver.

The forkserver imports modules anew, so a value that the script has assigned (`settings.LR = 0.5`)
would be the module's own there. What can be told apart from code is carried: of the user's own
modules all plain values, also in containers, in namespaces and in classes; of installed packages
their constants (`ImageFile.LOAD_TRUNCATED_IMAGES`); torch's default dtype and the like, and the
levels of loggers. A function that the script has replaced cannot be carried, and is refused.
"""

from __future__ import annotations

import logging
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

from lockstep.errors import TaskError
from lockstep.job.plain_values import NOT_PLAIN, decode, encode

Values = dict[str, Any]
"""By name, a value as `plain_values.encode` has it."""


@dataclass(frozen=True, kw_only=True)
class ScriptState:
    """What is carried, in a form that can be pickled without importing anything."""

    modules: dict[str, Values] = field(default_factory=dict)
    """By module: its values, those of classes as `Class.name`."""
    functions: dict[str, dict[str, str]] = field(default_factory=dict)
    """By module of the user's: where each of its functions comes from."""
    torch: dict[str, Any] = field(default_factory=dict)
    loggers: dict[str, int] = field(default_factory=dict)


def collect() -> ScriptState:
    """What this process has set."""
    modules, functions = {}, {}
    for name, module in list(sys.modules.items()):
        kind = _kind(name, module)
        if kind == "own":
            modules[name] = dict(_own_values(module))
            functions[name] = dict(_functions(module))
        elif kind == "installed":
            modules[name] = dict(_constants(module))
    return ScriptState(
        modules={name: values for name, values in modules.items() if values},
        functions={name: found for name, found in functions.items() if found},
        torch=_torch_switches(),
        loggers=_levels(),
    )


def _kind(name: str, module: object) -> str:
    """Whose a module is: the user's own, an installed package's, or one that is left alone."""
    file = getattr(module, "__file__", None)
    if name.partition(".")[0] in LEFT_ALONE or type(module) is not ModuleType:
        return ""
    if not isinstance(file, str) or getattr(module, "__name__", "") != name:
        return ""
    if "/site-packages/" in file or "/dist-packages/" in file:
        return "installed"
    return "" if file.startswith(STANDARD) else "own"


LEFT_ALONE = frozenset(
    {"__main__", "lockstep", "torch", "numpy", "cloudpickle", "_pytest", "pytest"}
)
"""Packages whose switches are not constants of modules; `__main__` goes with the task."""
STANDARD = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib")})


def _own_values(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, value in _named(module):
        if isinstance(value, type):
            if value.__module__ == module.__name__ and value.__qualname__ == name:
                for inner, each in _named(value):
                    encoded = encode(each)
                    if encoded is not NOT_PLAIN:
                        yield f"{name}.{inner}", encoded
            continue
        encoded = encode(value)
        if encoded is not NOT_PLAIN:
            yield name, encoded


def _constants(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(module).items()):
        if name.isupper() and not name.startswith("_") and type(value) in SCALARS:
            yield name, encode(value)


SCALARS = (bool, int, float, str, type(None))


def _functions(module: ModuleType) -> Iterator[tuple[str, str]]:
    for name, value in _named(module):
        if type(value) is FunctionType:
            yield name, f"{value.__module__}.{value.__qualname__}"


def _named(owner: Any) -> Iterator[tuple[str, Any]]:
    """An owner's attributes, without those that Python makes."""
    for name, value in list(vars(owner).items()):
        if name.isidentifier() and not name.startswith("__"):
            yield name, value


def _torch_switches() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    return {
        "dtype": torch.get_default_dtype(),
        "matmul": torch.get_float32_matmul_precision(),
        "mkldnn": torch.backends.mkldnn.enabled,
    }


def _levels() -> dict[str, int]:
    loggers = {"": logging.root, **logging.root.manager.loggerDict}
    return {
        name: logger.level
        for name, logger in loggers.items()
        if isinstance(logger, logging.Logger) and (logger.level or not name)
    }


# In the forkserver.


def apply_switches(state: ScriptState) -> None:
    """Set torch's switches and the levels of loggers. Called before the task is unpickled."""
    import torch

    if state.torch:
        torch.set_default_dtype(state.torch["dtype"])
        torch.set_float32_matmul_precision(state.torch["matmul"])
        torch.backends.mkldnn.set_flags(state.torch["mkldnn"])
    for name, level in state.loggers.items():
        logging.getLogger(name).setLevel(level)


def apply_values(state: ScriptState) -> None:
    """Set the modules' values: now where a module is imported, later when it is.

    Called when the task is unpickled: what modules do when they are imported, they have done in
    the script before it set anything.

    Raises:
        TaskError: the script has replaced a function.
    """
    pending = set()
    for name in state.modules.keys() | state.functions.keys():
        module = sys.modules.get(name)
        if module is None:
            pending.add(name)
        else:
            _apply(state, name, module)
    if pending:
        sys.meta_path.insert(0, _WhenImported(state, pending))


def _apply(state: ScriptState, name: str, module: ModuleType) -> None:
    for function, origin in state.functions.get(name, {}).items():
        _check_function(module, function, origin)
    for path, encoded in state.modules.get(name, {}).items():
        owner_name, _, leaf = path.rpartition(".")
        owner = getattr(module, owner_name, None) if owner_name else module
        if owner is None:
            continue
        current = vars(owner).get(leaf, NOT_PLAIN)
        if current is NOT_PLAIN or encode(current) != encoded:
            try:
                setattr(owner, leaf, decode(encoded, current))
            except (AttributeError, TypeError):  # an Enum's members, slots
                continue


def _check_function(module: ModuleType, name: str, origin: str) -> None:
    fresh = vars(module).get(name)
    if type(fresh) is not FunctionType:
        return
    found = f"{fresh.__module__}.{fresh.__qualname__}"
    if found != origin:
        raise TaskError(
            f"the script has replaced the function {module.__name__}.{name}, which the run imports "
            "anew",
            expected=f"{found}, as the module has it",
            found=origin,
            fix="call the other function by its own name, or replace it where the task does: in "
            "Task.model() or Task.train_data(), which run there",
        )


class _WhenImported:
    """A finder that sets a module's values when its code has run."""

    def __init__(self, state: ScriptState, pending: set[str]) -> None:
        self._state, self._pending = state, pending

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The spec that the other finders have, with a loader that sets values afterwards."""
        if name not in self._pending:
            return None
        self._pending.discard(name)
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                self._wrap(spec.loader, name)
                return spec
        return None

    def _wrap(self, loader: Any, name: str) -> None:
        run = getattr(loader, "exec_module", None)
        if run is None or not hasattr(loader, "__dict__") or isinstance(loader, type):
            return

        def run_and_set(module: ModuleType) -> None:
            del loader.exec_module
            run(module)
            _apply(self._state, name, module)

        loader.exec_module = run_and_set
