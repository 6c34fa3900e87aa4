"""CUDA device: a worker computes on a GPU. Written and reviewed; it has not been run on one.

Its home is the GPU's memory, with one stream. Nothing here is called before the worker's fork: a
process that has touched CUDA cannot be forked into one that may.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from lockstep.device import determinism
from lockstep.device.staged import StagedDevice
from lockstep.device.staging import ROOM
from lockstep.errors import ResourceError

DRIVER = Path("/proc/driver/nvidia/version")


class CudaDevice(StagedDevice):
    """One GPU, for one worker. Several workers may have one GPU, which is for tests."""

    def __init__(self, worker_id: int = 0) -> None:
        """Takes hold of the GPU.

        Raises:
            ResourceError: there is none that torch can use.
        """
        self._choices = determinism.configure()
        try:
            count = torch.cuda.device_count()
            where = torch.device("cuda", worker_id % max(count, 1))
            torch.cuda.set_device(where)
            torch.cuda.init()
            room = torch.empty(ROOM, dtype=torch.uint8, pin_memory=True)
            stream = torch.cuda.current_stream()
        except (RuntimeError, AssertionError) as error:
            raise ResourceError(
                "device: cuda, and there is no GPU that torch can use here",
                expected="an NVIDIA GPU, its driver, and torch's build for CUDA",
                found=str(error).splitlines()[0],
                fix="leave device out; look at nvidia-smi and torch.version.cuda",
            ) from error
        super().__init__(where, room, stream.synchronize)
        self._retries = _alloc_retries()

    def seed(self, seed: int) -> None:
        super().seed(seed)
        torch.cuda.manual_seed(seed)

    def confirm(self, step: int, shard: int) -> None:
        what = f"shard {shard} of step {step}"
        determinism.check_retries(self._retries, _alloc_retries(), what)

    def profile(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.where)
        return profile_of(
            gpu=properties.name,
            capability=(properties.major, properties.minor),
            processors=properties.multi_processor_count,
            driver=DRIVER.read_text() if DRIVER.exists() else "",
            choices=self._choices,
        )

    def probe(self) -> str:
        generator = torch.Generator().manual_seed(7)
        digest = hashlib.blake2b(digest_size=16)
        for dtype in (torch.float32, torch.bfloat16):
            x, w, image, kernel = (
                torch.randn(shape, generator=generator, dtype=torch.float32).to(self.where, dtype)
                for shape in ((33, 65), (65, 47), (2, 3, 17, 17), (5, 3, 3, 3))
            )
            results = [
                x @ w,
                torch.softmax(x, 1),
                functional.conv2d(image, kernel, padding=1),
                functional.layer_norm(x, (65,)),
                x.sum(0),
            ]
            for result in results:
                found = result.contiguous().view(torch.uint8).cpu()
                digest.update(found.numpy().data)
        return digest.hexdigest()


def _alloc_retries() -> int:
    """How often the allocator was out of memory, and tried again or gave up."""
    stats = torch.cuda.memory_stats()
    return int(stats.get("num_alloc_retries", 0)) + int(stats.get("num_ooms", 0))


def profile_of(
    *,
    gpu: str,
    capability: tuple[int, int],
    processors: int,
    driver: str,
    choices: dict[str, str | bool],
) -> dict[str, Any]:
    """What of a GPU and its libraries the bits depend on. `driver`: what the kernel says of it."""
    first = driver.splitlines()[0] if driver else ""
    return {
        "device": "cuda",
        "gpu": gpu,
        "gpu_capability": f"{capability[0]}.{capability[1]}",
        "gpu_processors": processors,
        "driver": first.removeprefix("NVRM version: ").strip() or "unknown",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **choices,
    }
