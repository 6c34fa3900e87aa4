"""Choice: the device that a plan names."""

from __future__ import annotations

from lockstep.device.apart import ApartDevice
from lockstep.device.device import Device
from lockstep.device.shared import SharedDevice


def device_of(name: str, worker_id: int = 0) -> Device:
    """A worker's device, by the name that the setting `device` has. Made in the worker.

    Raises:
        ResourceError: it is not there.
    """
    match name:
        case "cpu":
            return SharedDevice()
        case "cpu-apart":
            return ApartDevice()
        case "cuda":
            from lockstep.device.cuda import CudaDevice

            return CudaDevice(worker_id)
    raise ValueError(name)
