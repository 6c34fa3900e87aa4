"""The numerics profile: what, besides the job, the bits depend on."""

from __future__ import annotations

import platform
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PORTABLE = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "MKL_CBWR": "AVX2",
}
"""Variables that hold ATen, oneDNN and MKL to AVX2, so that hosts with newer processors agree."""

GPU = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
}
"""Variables that make cuBLAS add in one order, number GPUs alike in all processes, and let a task
ask `torch.cuda.is_available()` before workers are forked. They change nothing on a CPU."""
GPU_OVERRIDES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
"""Variables that would choose other kernels than the job says."""

HASH_SEED = "0"
"""PYTHONHASHSEED of every process that loads a task: a set of texts is iterated in one order, in
all hosts, runs and commands. What the user's environment says is not asked: it would differ."""


def set_environment(numerics: str, environment: MutableMapping[str, str]) -> None:
    """Prepare the environment of a process that will import torch and load a task."""
    if numerics == "portable":
        environment.update(PORTABLE)
    environment.update(GPU)
    for name in GPU_OVERRIDES:
        environment.pop(name, None)
    environment.setdefault("OMP_DYNAMIC", "FALSE")
    environment["PYTHONHASHSEED"] = HASH_SEED


def configure(threads: int) -> None:
    """Pin this process's kernels. Called in every process that computes, before it does."""
    import torch

    torch._C.set_num_threads(threads)  # not the patched one (see `torch_patches`)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def profile(numerics: str, threads: int) -> dict[str, Any]:
    """The profile as it is recorded in the manifest. Called in a process with torch."""
    import torch

    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "numerics": numerics,
        "threads": threads,
        "deterministic": True,
        "hash_seed": HASH_SEED,
    }


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Random numbers that do not depend on the default dtype, which a script may set."""
    import torch

    return torch.randn(*shape, generator=generator, dtype=torch.float32)


def probe() -> str:
    """A digest of what a few kernels compute here: two workers agree on it, or on nothing.

    Takes a few milliseconds; uses no global random state.
    """
    import torch
    from blake3 import blake3
    from torch.nn import functional

    generator = torch.Generator().manual_seed(7)
    digest = blake3()
    for dtype in (torch.float32, torch.bfloat16):
        x = _normal(generator, 33, 65).to(dtype)
        w = _normal(generator, 65, 47).to(dtype)
        image = _normal(generator, 2, 3, 17, 17).to(dtype)
        kernel = _normal(generator, 5, 3, 3, 3).to(dtype)
        results = [
            x @ w,
            torch.softmax(x, 1),
            torch.tanh(x) + torch.exp(x) * torch.rsqrt(x * x + 1),
            functional.conv2d(image, kernel, padding=1),
            functional.layer_norm(x, (65,)),
            x.sum(0),
        ]
        for result in results:
            digest.update(result.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]
