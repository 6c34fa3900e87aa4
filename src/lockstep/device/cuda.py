"""CUDA device: a worker computes on a GPU. Written and reviewed; it has not been run on one.

Its home is the GPU's memory, with one stream. Nothing here is called before the worker's fork: a
process that has touched CUDA cannot be forked into one that may.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch.nn import functional

from lockstep.device import determinism
from lockstep.device.device import SegmentName
from lockstep.device.placement import place
from lockstep.device.staging import ROOM, Staging
from lockstep.errors import ResourceError
from lockstep.planning.byte_ranges import ByteRange
from lockstep.state.control_segment import DIGEST_BYTES
from lockstep.state.private_state import private_state
from lockstep.state.shared_state import SharedState
from lockstep.system.seeding import seed_everything

DRIVER = Path("/proc/driver/nvidia/version")


class CudaDevice:
    """One GPU, for one worker. Several workers may have one GPU, which is for tests."""

    apart = True

    def __init__(self, worker_id: int = 0) -> None:
        """Takes hold of the GPU.

        Raises:
            ResourceError: there is none that torch can use.
        """
        self.moved = 0
        self._choices = determinism.configure()
        try:
            count = torch.cuda.device_count()
            self._device = torch.device("cuda", worker_id % max(count, 1))
            torch.cuda.set_device(self._device)
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            raise ResourceError(
                "device: cuda, and there is no GPU that torch can use here",
                expected="an NVIDIA GPU, its driver, and torch's build for CUDA",
                found=str(error).splitlines()[0],
                fix="leave device out; look at nvidia-smi and torch.version.cuda",
            ) from error
        room = torch.empty(ROOM, dtype=torch.uint8, pin_memory=True)
        self._staging = Staging(room, torch.cuda.current_stream().synchronize)
        self._homes: dict[SegmentName, torch.Tensor] = {}
        self._segments: dict[SegmentName, memoryview] = {}
        self._retries = self._alloc_retries()

    def home(self, shared: SharedState) -> SharedState:
        names: tuple[SegmentName, ...] = ("state", "slots")
        for name in names:
            segment = memoryview(shared.segments[name].map)
            self._segments[name] = segment
            self._homes[name] = torch.zeros(len(segment), dtype=torch.uint8, device=self._device)
        for _, own in shared.buffers:
            own.data = own.data.to(self._device)
        return private_state(shared, self._homes["state"], self._homes["slots"])

    def load(self, segment: SegmentName, ranges: Iterable[ByteRange]) -> None:
        home, shared = self._homes[segment], self._segments[segment]
        for run in _runs(ranges):
            self._staging.to_device(home[run], shared[run])
            self.moved += run.stop - run.start

    def store(self, segment: SegmentName, ranges: Iterable[ByteRange]) -> None:
        home, shared = self._homes[segment], self._segments[segment]
        for run in _runs(ranges):
            self._staging.to_segment(shared[run], home[run])
            self.moved += run.stop - run.start

    def settle(self) -> None:
        self._staging.settle()

    def place(self, batch: Any) -> Any:
        return place(batch, self._device)

    def seed(self, seed: int) -> None:
        seed_everything(seed)
        torch.cuda.manual_seed(seed)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast("cuda", torch.bfloat16)

    def confirm(self, step: int, shard: int) -> None:
        what = f"shard {shard} of step {step}"
        determinism.check_retries(self._retries, self._alloc_retries(), what)

    def digest(self, offset: int, nbytes: int) -> bytes:
        run = self._homes["state"][offset : offset + nbytes]
        return blake3(run.cpu().numpy().data).digest(DIGEST_BYTES)

    def profile(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self._device)
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
                torch.randn(shape, generator=generator, dtype=torch.float32).to(self._device, dtype)
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

    @staticmethod
    def _alloc_retries() -> int:
        return int(torch.cuda.memory_stats().get("num_alloc_retries", 0))


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


def _runs(ranges: Iterable[ByteRange]) -> list[slice]:
    return [slice(item.offset, item.offset + item.nbytes) for item in ranges]
