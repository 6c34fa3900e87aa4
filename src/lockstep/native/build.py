"""Build of the native library: one call of a C++ compiler, by an argument list."""

from __future__ import annotations

import os
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path

from lockstep.errors import ResourceError
from lockstep.native.sources import FLAGS, MODULE, foreign, library_path, source_files
from lockstep.system.folders import TemporaryFolder

FIX = "install g++ (apt install g++), or name another compiler: CXX=clang++ lockstep build-native"
MOST_SHOWN = 2000
"""Characters of what the compiler says, the last ones."""


def compiler() -> list[str]:
    """The command that compiles C++: `$CXX`, or g++.

    Raises:
        ResourceError: there is none.
    """
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(command[0]) is None:
        raise ResourceError(
            "there is no C++ compiler to build the native path with",
            expected="g++, or the command that CXX names",
            found=f"no {command[0]}",
            fix=FIX,
        )
    return command


def build(say: Callable[[str], None], *, again: bool = False) -> Path:
    """Build the library, unless it is there already; returns its path. `say` is told what is done.
    `again`: also if it is there.

    Raises:
        ResourceError: it cannot be built.
    """
    path, command = library_path(), compiler()
    if not again and path.is_file() and not foreign(path):
        say(f"it is there already: {path}")
        return path
    _prepare(path.parent)
    say(f"compiling with {command[0]}: this takes half a minute")
    with TemporaryFolder("partial.", path.parent) as folder:
        made = folder.path / path.name
        _run(arguments(command, made))
        made.chmod(stat.S_IRUSR | stat.S_IWUSR | stat.S_IXUSR)
        os.replace(made, path)
    _try_out(path)
    say(f"built: {path}")
    return path


def arguments(command: Sequence[str], output: Path) -> list[str]:
    """The compiler's command line."""
    import torch

    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    about = _version_of(command).replace("\\", "").replace('"', "")
    python = sysconfig.get_paths()
    # Not by torch.utils.cpp_extension: that loads setuptools, which refuses an earlier distutils.
    root = Path(torch.__file__).parent
    include = root / "include"
    api = include / "torch" / "csrc" / "api" / "include"
    headers = [str(include), str(api), python["include"], python["platinclude"]]
    return [
        *command,
        *FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        f'-DLOCKSTEP_COMPILER="{about}"',
        *(f"-I{each}" for each in dict.fromkeys(headers)),
        *(str(each) for each in source_files() if each.suffix == ".cpp"),
        "-o",
        str(output),
        f"-L{root / 'lib'}",
        "-ltorch_python",
        "-ltorch_cpu",
        "-lc10",
    ]


def _version_of(command: Sequence[str]) -> str:
    shown = _run([*command, "--version"]).splitlines()
    return shown[0].encode("ascii", "replace").decode()[:120] if shown else command[0]


def _prepare(folder: Path) -> None:
    """Make the folder, for this user alone.

    Raises:
        ResourceError: it cannot be made, or is another user's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.lstat(folder).st_uid == os.geteuid():
            folder.chmod(0o700)
            return
        found = "another user's folder"
    except OSError as error:
        found = str(error)
    raise ResourceError(
        f"the native path cannot be kept in {folder}",
        expected="a folder of this user's, which may be written to",
        found=found,
        fix="set XDG_CACHE_HOME to a folder of your own",
    )


def _run(command: Sequence[str]) -> str:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, errors="replace")
        code, said = ended.returncode, ended.stderr
    except OSError as error:
        code, said = -1, str(error)
    if code != 0:
        raise ResourceError(
            f"{command[0]} failed to build the native path",
            expected="a compiler for C++20, and the headers of this Python",
            found=said.strip()[-MOST_SHOWN:] or f"exit code {code}",
            fix=FIX,
        )
    return ended.stdout


def _try_out(path: Path) -> None:
    """Load it in another process: here one may have been loaded already.

    Raises:
        ResourceError: it cannot be loaded; it is removed.
    """
    code = (
        "import torch, sys; from lockstep.native.library import load_library; "
        "sys.exit(load_library().why_not or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if ended.returncode != 0:
        path.unlink(missing_ok=True)
        raise ResourceError(
            f"the native path was built, but {MODULE} cannot be loaded",
            expected="a library that fits this torch and this Python",
            found=ended.stderr.strip()[-MOST_SHOWN:],
            fix="build it with the compiler that this Python was made by, named by CXX",
        )
