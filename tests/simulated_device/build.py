"""Compile the simulated device, once for each version of its sources and of torch.

The library lies in the folder of torch's extensions, under a name that says what it was made of. Who builds holds a
lock, which the system takes back from a process that is killed: the others wait, and find it built. A build is done
beside and moved there as a whole, so that one that is killed leaves nothing that others would take for a library.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from pathlib import Path

_SOURCES = Path(__file__).parent / "csrc"
_NAME = "simulated_device_C"
_FLAGS = (
    "-O1", "-g0", "-w", "-pipe", "-std=c++20", "-fPIC", "-shared",
    f"-DTORCH_EXTENSION_NAME={_NAME}", "-DTORCH_API_INCLUDE_EXTENSION_H",
)  # fmt: skip
_LIBRARIES = ("c10", "torch_cpu", "torch", "torch_python")


class NoCompiler(Exception):
    """The simulated device cannot be built here; the message says why."""


def library() -> Path:
    """Where the built library is, or will be."""
    import torch

    made_of = hashlib.sha256(repr((torch.__version__, sys.version, _FLAGS)).encode())
    for source in sorted(_SOURCES.iterdir()):
        made_of.update(source.name.encode() + source.read_bytes())
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions")
    return root / f"shardwise_simulated_device_{made_of.hexdigest()[:20]}" / f"{_NAME}.so"


def build() -> Path:
    """The library, built if it is not there.

    Raises:
        NoCompiler: there is no C++ compiler.
        RuntimeError: the sources do not compile.
    """
    path = library()
    if path.exists():
        return path
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise NoCompiler(f"the simulated device cannot be built: there is no {compiler!r}")
    root = path.parent.parent
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{path.parent.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _build_beside(compiler, path)
    return path


def build_early() -> None:
    """Build it for whoever will ask for it. Why it cannot be built, they find themselves."""
    with suppress(NoCompiler, RuntimeError):
        build()


def _build_beside(compiler: str, path: Path) -> None:
    for left in path.parent.parent.glob(f"{path.parent.name}-*"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    beside = Path(tempfile.mkdtemp(prefix=f"{path.parent.name}-", dir=path.parent.parent))
    try:
        done = subprocess.run(
            [compiler, *_command(beside / path.name)], env=os.environ | {"TMPDIR": str(beside)},
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the simulated device does not compile\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
        beside.rename(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _command(target: Path) -> list[str]:
    import torch

    # What torch.utils.cpp_extension says too. But it needs an interpreter of its own, which loads what it has built,
    # and ninja.
    of_torch = Path(torch.__file__).parent
    headers = (
        of_torch / "include",
        of_torch / "include/torch/csrc/api/include",
        sysconfig.get_paths()["include"],
    )
    return [
        *_FLAGS,
        *(word for folder in headers for word in ("-isystem", str(folder))),
        str(_SOURCES / "unity.cpp"),
        *("-o", str(target), f"-L{of_torch / 'lib'}", *(f"-l{name}" for name in _LIBRARIES)),
    ]
