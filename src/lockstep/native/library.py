"""Native library: found and loaded, or the reason why not. Nothing is built here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from importlib.machinery import ExtensionFileLoader
from typing import Any

from lockstep.native.sources import MODULE, foreign, library_path

BUILD = "lockstep build-native"
"""The command that builds it."""


@dataclass(frozen=True, kw_only=True)
class Library:
    """What was found."""

    module: Any = None
    """None: it is not used."""
    why_not: str = ""


BY_REQUEST = Library(why_not="by request")


@functools.cache
def load_library() -> Library:
    """Load the library, once in a process; the forkserver does so before it forks workers."""
    if sys.platform != "linux":
        return Library(why_not="it is for Linux")
    try:
        path = library_path()
        problem = foreign(path)
        if problem:
            return Library(why_not=problem)
        loader = ExtensionFileLoader(MODULE, str(path))
        spec = importlib.util.spec_from_file_location(MODULE, path, loader=loader)
        assert spec is not None
        importlib.import_module("torch")  # with the libraries that this one needs
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except FileNotFoundError:
        return Library(why_not=f"not built for this version of it; to build it: {BUILD}")
    except (OSError, RuntimeError, ImportError) as error:
        first = str(error).partition("\n")[0][:200]
        return Library(why_not=f"it cannot be loaded ({BUILD} --again): {first}")
    return Library(module=module)
