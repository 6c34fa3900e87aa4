"""Lockstep: your PyTorch job on many workers, with the same bits as on one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lockstep.adapters.lightning.task import from_lightning
    from lockstep.adapters.module import from_module
    from lockstep.adapters.transformers.task import from_transformers
    from lockstep.agent.preload import preloaded
    from lockstep.api.background import Run, start
    from lockstep.api.evaluation import evaluate
    from lockstep.api.prediction import predict
    from lockstep.api.training import plan, resume, run
    from lockstep.api.verification import verify
    from lockstep.errors import LockstepError
    from lockstep.job.job import Job
    from lockstep.job.task import Parameters, Task
    from lockstep.optim.chained import Together
    from lockstep.results.callbacks import Callback
    from lockstep.results.result import Result

__all__ = [
    "Callback", "Job", "LockstepError", "Parameters", "Result", "Run", "Task", "Together",
    "evaluate", "from_lightning", "from_module", "from_transformers",
    "plan", "predict", "preloaded", "resume", "run", "start", "verify",
]  # fmt: skip
__version__ = "0.1.0"

_HOMES = {
    "Callback": "results.callbacks",
    "Job": "job.job",
    "LockstepError": "errors",
    "Parameters": "job.task",
    "Result": "results.result",
    "Run": "api.background",
    "Task": "job.task",
    "Together": "optim.chained",
    "evaluate": "api.evaluation",
    "from_lightning": "adapters.lightning.task",
    "from_module": "adapters.module",
    "from_transformers": "adapters.transformers.task",
    "plan": "api.training",
    "predict": "api.prediction",
    "preloaded": "agent.preload",
    "resume": "api.training",
    "run": "api.training",
    "start": "api.background",
    "verify": "api.verification",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import lockstep` is quick."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lockstep.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
