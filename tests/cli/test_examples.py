"""The files in examples/ for containers and clusters: as far as they can be checked without these,
and the containers' own commands as plain processes on loopback."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lockstep.recipes.datasets import fetch
from lockstep.results.result import Result
from tests.support.document_blocks import check_lockstep, lockstep_words, simple_commands
from tests.support.file_tree import ROOT
from tests.support.harmed_runs import events, until
from tests.support.page_runs import LOCKSTEP

EXAMPLES = ROOT / "examples"
COMPOSE = EXAMPLES / "docker" / "compose.yaml"
RAYJOB = EXAMPLES / "kuberay" / "rayjob.yaml"
BATCH = EXAMPLES / "slurm" / "lockstep.sbatch"
DOCKERFILES = sorted(EXAMPLES.rglob("Dockerfile"))
WAIT = 90.0


def told(path: Path) -> list[str]:
    """The commands in a file's comments, which are indented there."""
    return re.findall(r"^#   (\S.*)$", path.read_text(), re.M)


def of_service(service: Any) -> str:
    """A service's command, as a line of shell."""
    command = service["command"]
    if isinstance(command, str):
        return command
    assert command[:2] == ["sh", "-c"]
    return str(command[2])


def commands() -> Iterator[tuple[str, str]]:
    """Every command of the examples, with the file's name."""
    for path in (COMPOSE, RAYJOB, BATCH, *DOCKERFILES, *EXAMPLES.rglob("*.service")):
        for line in told(path):
            yield path.name, line
    for service in yaml.safe_load(COMPOSE.read_text())["services"].values():
        yield COMPOSE.name, of_service(service)
    yield RAYJOB.name, yaml.safe_load(RAYJOB.read_text())["spec"]["entrypoint"]
    joined = BATCH.read_text().replace("\\\n", " ")
    yield BATCH.name, re.findall(r"^exec (srun .*)$", joined, re.M)[0]
    for path in DOCKERFILES:
        for line in re.findall(r"^RUN (lockstep .*)$", path.read_text(), re.M):
            yield str(path), line
    for path in EXAMPLES.rglob("*.service"):
        yield path.name, re.findall(r"^ExecStart=(.*)$", path.read_text(), re.M)[0]


def test_the_commands_are_real() -> None:
    checked = 0
    for name, line in commands():
        for words in simple_commands(line.replace(";", " ; ")):
            arguments = lockstep_words(words)
            if arguments and "-t" not in words:  # the name of an image
                print(name, arguments)
                check_lockstep(arguments)
                checked += 1
    assert checked >= 14


def test_what_images_copy_is_there() -> None:
    for path in DOCKERFILES:
        for line in re.findall(r"^COPY (?:--\S+ )?(.*)$", path.read_text(), re.M):
            *sources, _ = line.split()
            assert all((ROOT / source).exists() for source in sources)


def test_the_batch_file_is_shell() -> None:
    ended = subprocess.run(["bash", "-n", str(BATCH)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", BATCH.read_text(), re.M))
    assert options["ntasks-per-node"] == "1"  # a rank is a host
    assert options["signal"].startswith("TERM@")  # to the ranks, not to the script


def test_the_ray_job_fits_together() -> None:
    job = yaml.safe_load(RAYJOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    images, cores = set(), []
    for part in (cluster["headGroupSpec"], group):
        pod = part["template"]["spec"]
        (container,) = pod["containers"]
        assert re.fullmatch(r"[a-z0-9-]+", container["name"])
        images.add(container["image"])
        cores.append(int(container["resources"]["limits"]["cpu"]) * part.get("replicas", 1))
        volumes = {volume["name"] for volume in pod.get("volumes", ())}
        assert {mount["name"] for mount in container.get("volumeMounts", ())} <= volumes
    assert len(images) == 1
    version = re.findall(r"^FROM rayproject/ray:([\d.]+)", DOCKERFILES[1].read_text(), re.M)
    assert version == [cluster["rayVersion"]]
    wanted = shlex.split(job["spec"]["entrypoint"])
    assert int(wanted[wanted.index("--workers") + 1]) == sum(cores)
    assert wanted[wanted.index("--out") + 1].startswith("/runs/")  # on the volume


class Containers:
    """The services of the compose file as processes, each with a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.services = yaml.safe_load(COMPOSE.read_text())["services"]
        (folder / "bin").mkdir()
        (folder / "bin" / "lockstep").write_text(LOCKSTEP)
        (folder / "bin" / "lockstep").chmod(0o755)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def local(self, command: str) -> str:
        """The command with the paths and the addresses of this machine."""
        command = re.sub(r"10\.77\.0\.\d+", "127.0.0.1", command)
        return re.sub(r"/(tokens|runs)/", rf"{self.folder}/\1/", command)

    def environment(self, name: str) -> dict[str, str]:
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "XDG_STATE_HOME": str(self.folder / name)}

    def up(self) -> None:
        for kind in ("tokens", "runs"):
            (self.folder / kind).mkdir()
        for name, service in self.services.items():
            command = ["sh", "-c", f"exec {of_service(service)}"]
            if isinstance(service["command"], list):
                command = ["sh", "-c", of_service(service)]
            self.processes[name] = subprocess.Popen(
                [self.local(word) for word in command], cwd=self.folder,
                env=self.environment(name), stderr=subprocess.DEVNULL,
            )  # fmt: skip

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """`docker compose exec SERVICE COMMAND`."""
        *_, name, rest = re.split(r"compose exec (\w+) ", command)
        return subprocess.run(
            ["sh", "-c", self.local(rest)], cwd=self.folder, env=self.environment(name),
            capture_output=True, text=True, timeout=WAIT,
        )  # fmt: skip

    def down(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            process.wait(WAIT)


@pytest.mark.long
def test_the_composed_hosts_train_together(tmp_path: Path) -> None:
    """Both join with their tokens, and the commands of the comment give the bits of one host."""
    pytest.importorskip("cryptography", reason="needs the extra net")
    fetch("mnist")
    listing, training = [line for line in told(COMPOSE) if "exec a lockstep" in line][:2]
    containers = Containers(tmp_path)
    try:
        containers.up()
        until(lambda: len(containers.run(listing).stdout.splitlines()) == 2, WAIT, "two hosts")
        ended = containers.run(training)
        assert ended.returncode == 0, ended.stderr
    finally:
        containers.down()
    folder = tmp_path / "runs" / "first"
    names = [set(event["hosts"]) for event in events(folder, "hosts") if event["going_on"]]
    assert {"a", "b", "c"} in names
    alone = [
        sys.executable, "-m", "lockstep", "run", "mnist", "--model", "softmax", "--workers", "1",
        "--data-epochs", "1", "--quiet", "--out", "alone",
    ]  # fmt: skip
    assert subprocess.run(alone, cwd=tmp_path, capture_output=True).returncode == 0
    assert Result.open(folder).fingerprint == Result.open(tmp_path / "alone").fingerprint
