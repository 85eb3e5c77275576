# SPDX-License-Identifier: Apache-2.0
"""Builds the kernel library, once for each version of its source, into a folder of the user.

Nothing but the files of this package is compiled, and nothing but what was compiled here (or came
with the package) is loaded. The file name holds a hash of the source, the flags and the compiler,
so that a changed source never meets an old library; a finished file is renamed into place, so that
processes that build at the same time do not disturb each other.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from modewright.errors import KernelError

SOURCE = Path(__file__).parent / "source"
BUNDLED = Path(__file__).parent / "bundled"
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 120
_FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-pthread",
    "-Wno-psabi",
)
_X86 = {"x86_64", "amd64"}
_OF_FILE = {
    "avx2.cpp": ("-mavx2", "-mfma", "-mf16c", "-mbmi2"),
    "avx512.cpp": (
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
        *("-mavx512vnni", "-mavx512vbmi", "-mbmi2", "-mfma", "-mf16c"),
    ),
}


def library_path(folder: Path | None = None) -> Path:
    """Return the path of the built library, and build it if it is not there.

    Args:
        folder: Where built libraries are kept; a folder of the user by default.

    Raises:
        KernelError: There is no compiler, it failed, or the folder is not the user's alone.
    """
    name = library_name()
    bundled = BUNDLED / name
    if bundled.is_file():
        return bundled
    place = folder or _user_folder()
    made = place / name
    _make_private(place)
    if not made.is_file():
        build(made)
    _check_owner(made)
    return made


def build(made: Path) -> None:
    """Compile the library into a file.

    Raises:
        KernelError: There is no compiler, or it failed.
    """
    compiler = find_compiler()
    sources = sorted(SOURCE.glob("*.cpp"))
    with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        objects = [str(Path(scratch) / f"{source.stem}.o") for source in sources]
        commands = [
            [compiler, *flags_of(source), "-c", str(source), "-o", target]
            for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(len(commands)) as workers:
            list(workers.map(_run, commands))
        linked = Path(scratch) / made.name
        _run([compiler, "-shared", "-pthread", *objects, "-o", str(linked)])
        linked.replace(made)


def flags_of(source: Path) -> tuple[str, ...]:
    """Return the compiler's flags for one file."""
    if platform.machine().lower() in _X86:
        return (*_FLAGS, *_OF_FILE.get(source.name, ()))
    return _FLAGS


def find_compiler() -> str:
    """Return the path of a C++ compiler: ``$CXX``, or the first of some names on the path.

    Raises:
        KernelError: There is none.
    """
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    raise KernelError(f"no C++ compiler: neither $CXX nor any of {', '.join(COMPILERS)} is there")


def library_name() -> str:
    """Return the file name of the library, which holds a hash of all that it is made from."""
    digest = hashlib.sha256(platform.machine().encode())
    for source in sorted(SOURCE.iterdir()):
        if source.suffix in (".cpp", ".h"):
            digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
            digest.update(" ".join(flags_of(source)).encode())
    return f"modewright-kernels-{digest.hexdigest()[:20]}.so"


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{command[0]} did not run: {error}") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        first = next((line for line in said if "error" in line), said[0])
        raise KernelError(f"{command[0]} failed: {first}")


def _user_folder() -> Path:
    import platformdirs  # not there while a wheel is built

    return Path(platformdirs.user_cache_dir("modewright")) / "kernels"


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise KernelError(f"{folder} cannot be made: {error.strerror}") from error
    _check_owner(folder)
    if not os.access(folder, os.W_OK):
        raise KernelError(f"{folder} cannot be written to")


def _check_owner(path: Path) -> None:
    """Refuse what another user owns or may write: it would be loaded into this process."""
    if not hasattr(os, "getuid"):
        return
    found = path.stat()
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise KernelError(f"{path} is not this user's alone: others own it or can write to it")
