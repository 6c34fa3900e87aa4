"""Launchers by name: the launcher that `--on NAME` selects."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from lockstep.cluster.daemon.launcher import ClusterLauncher
from lockstep.cluster.state_folder import default_state
from lockstep.net.transport import Report


def open_launcher(
    on: str, state: Path | None, show: Report
) -> AbstractContextManager[ClusterLauncher]:
    """The launcher that `--on` names: `up` for this machine's cluster, `ray`, or a token file.

    Raises:
        IdentityError: there is no such launcher.
        LockstepError: the cluster cannot be reached, or does not let this machine in.
    """
    from lockstep.cluster.ray.launcher import address_in, on_ray
    from lockstep.cluster.token_file import read_token

    ray = address_in(on)
    if ray is not None:
        return on_ray(ray, show)
    folder = state or default_state()
    if on == "up":
        return ClusterLauncher.of_this_machine(folder, show)
    return ClusterLauncher.of_token(read_token(on), folder, show)
