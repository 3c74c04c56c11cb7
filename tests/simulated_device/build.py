"""Compile the simulated device, once for each version of its sources and of torch.

The library lies in torch's folder for extensions, under a name that says what it was made of. A build is done beside
and moved there as a whole, so that any number of processes may want it at once, and one that is killed leaves nothing
that others would wait for.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_SOURCES = Path(__file__).parent / "csrc"
_NAME = "simulated_device_C"
_FLAGS = ("-O1", "-g0", "-w")


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
    path.parent.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=path.parent.name, dir=path.parent.parent))
    try:
        # In a process of its own: a process that has loaded it has a device that other tests do not expect.
        done = subprocess.run(
            [sys.executable, __file__, str(beside)], env=os.environ | {"PATH": _search_path()},
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"the simulated device does not compile\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}")
        try:
            beside.rename(path.parent)
        except OSError:
            if not path.exists():  # another process was first otherwise
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return path


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
