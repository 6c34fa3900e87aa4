"""What every device promises, call by call (see `lockstep.device.device`)."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from typing import cast

import numpy as np
import pytest
import torch
from blake3 import blake3

from lockstep.device.choice import device_of
from lockstep.device.device import Device
from lockstep.device.staged import StagedDevice
from lockstep.planning.byte_ranges import ByteRange
from lockstep.state.control_segment import DIGEST_BYTES
from lockstep.state.shared_state import SharedState
from lockstep.system import numerics
from lockstep.worker import build_state as building
from tests.zoo import ZOO

NAMES = ("cpu", "cpu-apart", "staged")


def made(name: str) -> Device:
    """A device. `staged` is what `cuda` is made of, on the CPU, with very little pinned memory."""
    if name == "staged":
        room = torch.empty(1000, dtype=torch.uint8)
        return StagedDevice(torch.device("cpu"), room, lambda: None)
    return device_of(name)


class Host:
    """The shared state of a host, and a device; all views of it go with this."""

    def __init__(self, name: str) -> None:
        task = ZOO["cnn"].task
        self.device = made(name)
        self.shared = building.build(task, task.model(), shards=3, max_workers=1, clip=True)
        self.whole = [ByteRange(offset=0, nbytes=self.shared.layout.state_bytes)]

    def loaded(self) -> SharedState:
        """A home with the host's state."""
        home = self.device.home(self.shared)
        self.device.load("state", self.whole)
        self.device.settle()
        return home

    def close(self) -> None:
        control, segments = self.shared.control, self.shared.segments
        vars(self).clear()
        gc.collect()
        control.close()
        for name in ("state", "slots", "snapshot"):
            segments[name].close()


@pytest.fixture(params=NAMES)
def host(request: pytest.FixtureRequest) -> Iterator[Host]:
    host = Host(cast("str", request.param))
    yield host
    host.close()


@pytest.fixture(params=NAMES)
def device(request: pytest.FixtureRequest) -> Device:
    return made(cast("str", request.param))


@pytest.fixture
def apart() -> Iterator[Host]:
    host = Host("cpu-apart")
    yield host
    host.close()


def test_a_home_has_the_offsets_of_the_segments(host: Host) -> None:
    device, shared = host.device, host.shared
    ranges = [shared.block_ranges(number) for number in range(len(shared.blocks))]
    slots = shared.slot_map()
    shapes = [(p.shape, p.stride()) for p in shared.params]
    home = device.home(shared)
    assert [home.block_ranges(number) for number in range(len(home.blocks))] == ranges
    assert home.slot_map() == slots
    assert [(p.shape, p.stride()) for p in home.params] == shapes
    assert [p is q for p, q in zip(home.params, shared.params, strict=True)]


def test_a_home_is_loaded_with_the_state(host: Host) -> None:
    shared = host.shared
    before = shared.state_bytes.clone()
    home = host.loaded()
    assert torch.equal(home.state_bytes, before)
    for name, parameter in home.model.named_parameters():
        entry = home.layout.entry(name)
        found = parameter.detach().reshape(-1)
        stored = before[entry.offset : entry.offset + entry.nbytes].view(parameter.dtype)
        assert torch.equal(found.sort().values, stored.sort().values)


def test_what_is_stored_is_there_when_it_has_settled(host: Host) -> None:
    device, shared = host.device, host.shared
    home = device.home(shared)
    flat, size = home.slots[1].flat, shared.layout.slots_bytes
    flat[:] = torch.arange(len(flat)) % 251
    device.store("slots", [ByteRange(offset=size, nbytes=size)])
    device.settle()
    found = memoryview(shared.segments["slots"].map)[size : 2 * size]
    assert bytes(found) == bytes(flat.tolist())


def test_what_is_computed_before_a_store_is_stored(host: Host) -> None:
    device, shared = host.device, host.shared
    home = host.loaded()
    parameter = home.params[0]
    with torch.no_grad():
        parameter.fill_(3.0)
    entry = home.layout.entry(home.names[0])
    device.store("state", [ByteRange(offset=entry.offset, nbytes=entry.nbytes)])
    device.settle()
    stored = bytes(memoryview(shared.segments["state"].map)[entry.offset : entry.offset + 4])
    assert stored == np.float32(3.0).tobytes()


def test_the_digest_is_that_of_the_homes_bytes(host: Host) -> None:
    device = host.device
    home = host.loaded()
    wanted = blake3(bytes(home.state_bytes[256:512].tolist())).digest(DIGEST_BYTES)
    assert device.digest(256, 256) == wanted


def test_seeded_generators_draw_the_same(device: Device) -> None:
    def drawn() -> tuple[float, float, float]:
        device.seed(11)
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    assert drawn() == drawn()


def test_a_batch_keeps_its_form(device: Device) -> None:
    batch = {"x": [torch.ones(2), 3], "y": ("a", None)}
    placed = device.place(batch)
    assert torch.equal(placed["x"][0], torch.ones(2))
    assert (placed["x"][1], placed["y"]) == (3, ("a", None))


def test_a_cpu_computes_what_the_forkserver_does(device: Device) -> None:
    assert device.probe() == numerics.probe()
    assert device.profile() == {}


# What is apart is apart: a settle that is left out shows.


def test_nothing_moves_before_it_settles(apart: Host) -> None:
    device, shared = apart.device, apart.shared
    home = device.home(shared)
    device.load("state", apart.whole)
    assert not home.state_bytes.any()
    assert device.moved == 0
    device.settle()
    assert device.moved == shared.layout.state_bytes
    home.state_bytes[:] = 7
    device.store("state", apart.whole)
    assert not bool((shared.state_bytes == 7).all())
    device.settle()
    assert bool((shared.state_bytes == 7).all())


def test_a_home_that_is_apart_changes_nobody_elses(apart: Host) -> None:
    shared = apart.shared
    before = shared.state_bytes.clone()
    home = apart.device.home(shared)
    with torch.no_grad():
        for parameter in home.params:
            parameter.fill_(1.0)
        for slot in home.slots:
            slot.flat.fill_(1)
    assert torch.equal(shared.state_bytes, before)
    assert not any(bool(slot.flat.any()) for slot in shared.slots)


def test_loads_that_are_late_come_before_stores(apart: Host) -> None:
    """So of two workers that have both forgotten to settle, one at least gets what is old."""
    device, shared = apart.device, apart.shared
    home = device.home(shared)
    home.state_bytes[:] = 7
    device.store("state", apart.whole)
    device.load("state", apart.whole)
    device.settle()
    assert not bool((home.state_bytes == 7).all())
