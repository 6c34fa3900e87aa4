"""What of the CUDA device a machine without a GPU can test: rules, refusals, profile, staging.

That it computes the same bits for any number of workers can be tested on a GPU alone: see
`make device-check`, and docs/devices.md.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict, namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import lockstep
from lockstep.device import determinism
from lockstep.device.cuda import CudaDevice, profile_of
from lockstep.device.placement import place
from lockstep.device.staged import StagedDevice
from lockstep.device.staging import Staging
from lockstep.errors import JobError, OptimizerError, ResourceError, TaskError
from lockstep.results.manifest import device_differences
from lockstep.system import numerics, processes
from lockstep.worker import build_state, device_facts
from tests.support import no_gpu
from tests.support.harmed_runs import Yard, yard
from tests.zoo.vectors import Vectors

__all__ = ["yard"]  # a fixture


# What decides bits.


def test_the_environment_is_set_before_torch_is_loaded() -> None:
    environment = {"NVIDIA_TF32_OVERRIDE": "1", "CUBLAS_WORKSPACE_CONFIG": ":0:0"}
    numerics.set_environment("native", environment)
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert environment["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"
    assert "NVIDIA_TF32_OVERRIDE" not in environment


def test_what_is_chosen_is_what_is_recorded() -> None:
    before = torch.backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    try:
        choices = determinism.configure()
        assert choices == {"tf32": False, "reduced_precision_sums": False, "sdpa": "math"}
        matmul = torch.backends.cuda.matmul
        assert not matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
        assert not matmul.allow_bf16_reduced_precision_reduction
        assert torch.backends.cuda.math_sdp_enabled()
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.backends.cudnn.deterministic = before[0]
        torch.use_deterministic_algorithms(before[1])
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_mem_efficient_sdp(True)
        torch.backends.cuda.enable_cudnn_sdp(True)


def test_the_profile_names_what_bits_depend_on() -> None:
    driver = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.1  Tue\nGCC version: gcc 13\n"
    profile = profile_of(
        gpu="H200", capability=(9, 0), processors=132, driver=driver, choices={"sdpa": "math"}
    )
    assert set(profile) == {
        "device", "gpu", "gpu_capability", "gpu_processors", "driver", "cuda", "cudnn", "sdpa",
    }  # fmt: skip
    assert profile["driver"] == "NVIDIA UNIX x86_64 Kernel Module  570.1  Tue"
    assert (profile["gpu_capability"], profile["gpu_processors"]) == ("9.0", 132)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> CudaDevice:
    """A CUDA device whose memory is the CPU's, on a machine whose driver says little."""
    device = CudaDevice.__new__(CudaDevice)
    StagedDevice.__init__(
        device, torch.device("cpu"), torch.empty(64, dtype=torch.uint8), lambda: None
    )
    device._choices, device._retries = {"sdpa": "math"}, 3
    properties = SimpleNamespace(name="H200", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    stats = {"num_alloc_retries": 2, "num_ooms": 1}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: stats)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda _: None)
    return device


def test_the_device_says_what_it_is_and_what_it_computes(gpu: CudaDevice) -> None:
    profile = gpu.profile()
    assert (profile["gpu"], profile["gpu_processors"]) == ("H200", 132)
    assert gpu.probe() == gpu.probe()
    assert len(gpu.probe()) == 32
    assert json.loads(json.dumps(profile)) == profile


def test_each_shard_is_confirmed(gpu: CudaDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.confirm(0, 0)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_ooms": 4})
    with pytest.raises(ResourceError, match="shard 2 of step 5"):
        gpu.confirm(5, 2)


def test_the_gpus_generator_is_seeded_with_the_others(
    gpu: CudaDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    gpu.seed(12)
    first = torch.rand(())
    gpu.seed(12)
    assert torch.equal(torch.rand(()), first)
    assert seeds == [12, 12]


class Puts(Vectors):
    """Writes to positions that might be the same: which one is last is left to chance."""

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        loss = super().loss(model, batch)
        return loss + torch.zeros(3).put_(torch.tensor([1, 1]), torch.ones(2)).sum()


def test_an_operation_without_a_deterministic_kernel_is_named(yard: Yard) -> None:
    """The same message as a GPU's, from one that torch refuses on the CPU, too."""
    with pytest.raises(TaskError, match=r"put_ has no deterministic kernel") as caught:
        yard.run(Puts(), batch_size=24, steps=3, purity=0.0)
    assert caught.value.found == "put_"
    assert "test_gpu_rules.py" in caught.value.what


def test_other_errors_name_no_operation() -> None:
    assert determinism.nondeterministic_operation(RuntimeError("out of memory")) is None
    assert determinism.nondeterministic_operation(ValueError("does not have a")) is None


def test_a_shard_for_which_the_allocator_tried_again_is_refused() -> None:
    determinism.check_retries(2, 2, "shard 0 of step 0")
    with pytest.raises(ResourceError, match="shard 3 of step 7") as caught:
        determinism.check_retries(2, 5, "shard 3 of step 7")
    assert "3 allocations" in str(caught.value.found)


class Full(Vectors):
    """Raises what torch raises where a GPU has no memory left."""

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def test_a_gpu_without_memory_is_no_fault_of_the_task(yard: Yard) -> None:
    with pytest.raises(ResourceError, match="no memory left while computing step 0"):
        yard.run(Full(), batch_size=24, steps=3, purity=0.0)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"workers": 1}, "has not been run on a GPU"),
        ({"experimental": True}, "the number of workers is left open"),
        ({"experimental": True, "workers": 1, "slices": 2}, "slices does not go with device"),
        ({"experimental": True, "workers": 1, "audit": 0.5}, "audit does not go with device"),
    ],
)
def test_what_a_job_on_gpus_needs(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(JobError, match=says):
        lockstep.Job(task=Vectors(), device="cuda", **settings)


class Own(torch.optim.SGD):
    """A subclass: what it does is not known."""


class ByOwn(Vectors):
    def optimizer(self, params: lockstep.Parameters) -> torch.optim.Optimizer:
        return Own(params, lr=0.1)


def test_optimizers_that_cannot_be_divided_are_refused_by_name() -> None:
    task = ByOwn()
    with pytest.raises(OptimizerError, match="Own is not known to update tensors one by one"):
        build_state.build(task, task.model(), shards=2, max_workers=1, clip=False, device="cuda")


def test_another_gpu_is_told_of() -> None:
    had = {"gpu": "H200", "gpu_processors": 132, "cuda": "12.8", "device_probe": "aa"}
    assert device_differences({"profile": {}}, {}) == ()
    assert device_differences({"profile": had}, had) == ()
    (note,) = device_differences({"profile": had}, {**had, "gpu_processors": 114})
    assert note == "gpu_processors is 114 here; the run had 132"


# Moves.


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_staging_moves_every_byte(size: int) -> None:
    """Through a room that is larger, or many times smaller."""
    waited: list[int] = []
    staging = Staging(torch.empty(size, dtype=torch.uint8), lambda: waited.append(1))
    source = bytearray(range(250)) + bytearray(range(50))
    home = torch.zeros(300, dtype=torch.uint8)
    staging.to_device(home[:120], memoryview(source)[:120])
    staging.to_device(home[120:], memoryview(source)[120:])
    staging.settle()
    assert bytes(home.tolist()) == bytes(source)
    target = bytearray(300)
    staging.to_segment(memoryview(target)[:10], home[:10])
    staging.to_segment(memoryview(target)[10:], home[10:])
    if size == 1000:
        assert not any(target)  # before it has settled
    staging.settle()
    assert target == source
    assert waited


Pair = namedtuple("Pair", "x y")  # as users have them


def test_a_batch_is_placed_in_its_own_containers() -> None:
    device = torch.device("meta")
    batch = {"pair": Pair(torch.ones(2), "name"), "list": [torch.ones(1), 3]}
    placed = place(batch, device)
    assert type(placed["pair"]) is Pair
    assert (placed["pair"].x.device, placed["pair"].y) == (device, "name")
    assert (placed["list"][0].device, placed["list"][1]) == (device, 3)
    ordered = place(OrderedDict(x=torch.ones(1)), device)
    assert type(ordered) is OrderedDict
    assert ordered["x"].device == device
    assert batch["list"][0].device == torch.device("cpu")


# Processes.


def test_the_forkserver_never_reaches_for_the_gpu(
    yard: Yard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork of it does, and has none here; so the run ends, and says so."""
    told = tmp_path / "told"
    monkeypatch.setenv(no_gpu.TOLD, str(told))
    with pytest.raises(ResourceError, match="no GPU that torch can use") as caught:
        yard.run(
            "tests.support.no_gpu:NoGpu", batch_size=24, steps=3, workers=1, device="cuda",
            experimental=True,
        )  # fmt: skip
    assert "this is a test" in str(caught.value.found)
    lines = [line.split() for line in told.read_text().splitlines()]
    (forkserver,) = {pid for what, pid, _ in lines if what == "loaded"}
    reached = [(pid, parent) for what, pid, parent in lines if what == "reached"]
    assert reached
    assert all(pid != forkserver and parent == forkserver for pid, parent in reached)
    assert not any(what == "descriptor" for what, *_ in lines)


def test_a_task_that_has_touched_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    device_facts.check_untouched()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(TaskError, match="before workers were forked"):
        device_facts.check_untouched()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(device_facts, "_driver_is_initialized", lambda: True)
    with pytest.raises(TaskError, match="before workers were forked"):
        device_facts.check_untouched()


def test_a_loader_lets_go_of_the_device(tmp_path: Path) -> None:
    device, other = tmp_path / "device0", tmp_path / "other"
    device.touch()
    other.touch()
    fds = [os.open(path, os.O_RDONLY) for path in (device, device, other)]
    pid = os.fork()
    if pid == 0:
        try:
            processes.close_device_files(str(tmp_path / "device"))
            links = [os.path.exists(f"/proc/self/fd/{fd}") for fd in fds]
            os._exit(0 if links == [False, False, True] else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(pid, 0)
    for fd in fds:
        os.close(fd)
    assert os.waitstatus_to_exitcode(status) == 0
