"""Determinism on a GPU: what torch is told, and when a result is refused. Pure but `configure`.

What decides bits on a GPU, and why each of these is so: docs/devices.md.
"""

from __future__ import annotations

import re

from lockstep.errors import ResourceError, TaskError

_OPERATION = re.compile(r"(\S+) does not have a deterministic implementation")


def configure() -> dict[str, str | bool]:
    """Pin this process's GPU kernels, before the first is run; what was chosen, for the profile."""
    import torch

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = False
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = False
    matmul.allow_fp16_reduced_precision_reduction = False
    matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_math_sdp(True)
    return {"tf32": False, "reduced_precision_sums": False, "sdpa": "math"}


def nondeterministic_operation(error: BaseException) -> str | None:
    """The operation that has no deterministic kernel, where that is what torch says."""
    found = _OPERATION.search(str(error)) if isinstance(error, RuntimeError) else None
    return found[1] if found is not None else None


def not_deterministic(operation: str, where: str) -> TaskError:
    """What to raise then. `where` it was called, for people."""
    return TaskError(
        f"{operation} has no deterministic kernel on this device: its result would change from run "
        f"to run; it was called {where}",
        expected="operations whose kernels add in a fixed order",
        found=operation,
        fix="use another operation (torch.use_deterministic_algorithms lists them), or another "
        "device",
    )


def check_retries(before: int, after: int, what: str) -> None:
    """Refuse what was computed while the allocator was short of memory.

    It tried again after it had given back what it kept. Meanwhile cuDNN may have been given less
    room than it asked for, and then it takes another algorithm, with other bits, and says nothing.

    Raises:
        ResourceError: there was such a try.
    """
    if after != before:
        raise ResourceError(
            f"the GPU's memory ran short while {what} was computed: kernels may have been others, "
            "with other bits",
            expected="memory enough for each shard without a second try",
            found=f"{after - before} allocations that were tried again",
            fix="use more shards, so that each is smaller, or a GPU that nobody else uses",
        )
