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
import tempfile
from contextlib import suppress
from pathlib import Path

_SOURCES = Path(__file__).parent / "csrc"
_NAME = "simulated_device_C"
_FLAGS = ("-O1", "-g0", "-w", "-pipe")


class NoCompiler(Exception):
    """The simulated device cannot be built here; the message says why."""


def library() -> Path:
    """Where the built library is, or will be."""
    import torch
    from torch.utils import cpp_extension

    made_of = hashlib.sha256(repr((torch.__version__, sys.version, _FLAGS)).encode())
    for source in sorted(_SOURCES.iterdir()):
        made_of.update(source.name.encode() + source.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    return Path(root) / f"shardwise_simulated_device_{made_of.hexdigest()[:20]}" / f"{_NAME}.so"


def build() -> Path:
    """The library, built if it is not there.

    Raises:
        NoCompiler: there is no C++ compiler or no ninja.
        RuntimeError: the sources do not compile.
    """
    path = library()
    if path.exists():
        return path
    for program in (os.environ.get("CXX", "c++"), "ninja"):
        if shutil.which(program, path=_search_path()) is None:
            raise NoCompiler(f"the simulated device cannot be built: there is no {program!r}")
    root = path.parent.parent
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{path.parent.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _build_beside(path)
    return path


def build_early() -> None:
    """Build it for whoever will ask for it. Why it cannot be built, they find themselves."""
    with suppress(NoCompiler, RuntimeError):
        build()


def _build_beside(path: Path) -> None:
    for left in path.parent.parent.glob(f"{path.parent.name}-*"):  # by one that was killed
        shutil.rmtree(left, ignore_errors=True)
    beside = Path(tempfile.mkdtemp(prefix=f"{path.parent.name}-", dir=path.parent.parent))
    try:
        # In a process of its own: a process that has loaded it has a device that other tests do not expect.
        done = subprocess.run(
            [sys.executable, __file__, str(beside)], env=os.environ | {"PATH": _search_path(), "TMPDIR": str(beside)},
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the simulated device does not compile\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
        beside.rename(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _search_path() -> str:
    """Programs that come with Python packages lie beside the interpreter."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _compile(folder: str) -> None:
    from torch.utils import cpp_extension

    cpp_extension.load(
        _NAME, [str(_SOURCES / "unity.cpp")], build_directory=folder, extra_cflags=list(_FLAGS), verbose=True
    )


if __name__ == "__main__":
    _compile(sys.argv[1])
