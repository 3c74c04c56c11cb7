"""What holds for every test."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

import processes
from process_servers import Nest

_nests: list[Nest] = []  # for the processes that share the tests

# What is imported is no garbage, and to look through it again and again takes longer than all imports. From the first
# test on it is collected: see processes.collect_rarely().
gc.disable()
# With it, a print() is two writes, and the lines of several processes that share a pipe come out mixed.
os.environ.pop("PYTHONUNBUFFERED", None)
# Every rank imports the module of its test, and every new interpreter all of Shardwise: to compile them anew each time
# would be a good part of all that the tests do.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Before torch is imported. The models are tiny: more threads only wait for each other, long on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"
# Whoever connects to a store asks for the name of the address, of this host's own too (c10d's formatSockAddr), and an
# answer of the name server that is lost takes five seconds.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")

# The files that take longest, by themselves or by waiting. Several processes share the files: what begins last should
# be short, or the others wait for it. Otherwise files with few tests come last, and some of these have few.
_LONGEST = (
    "plan_questions", "offload", "examples", "alias_libraries", "offload_params", "any_to_any", "launch",
    "trainer_saving", "scenarios", "doctor", "faults", "load", "plan_memory", "data", "plan_auto", "saving", "generate",
    "deepspeed_checkpoints", "copies", "quantized", "plan_subject", "deferred_update", "load_devices", "silent",
    "alias", "trainer_alias", "lightning", "in_backward", "startup", "devices", "checkpoint_memory", "plan_calibrate",
    "simulated_training",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        processes.live_in(config.workerinput["nests"])
    if hasattr(config.option, "loadscopereorder"):  # of pytest-xdist
        config.option.loadscopereorder = False


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Of pytest-xdist: a process that takes a share of the tests is about to start."""
    if not _nests:
        folder = tempfile.mkdtemp(prefix="shardwise-tests-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _nests.extend(Nest(f"{folder}/{number}") for number in range(2))
    node.workerinput["nests"] = [nest.address for nest in _nests]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": index for index, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish(session: pytest.Session) -> None:
    processes.collect_rarely()
    gc.enable()
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0" and any(map(_needs_the_simulated_device, session.items)):
        _begin_to_build_the_simulated_device()


def _needs_the_simulated_device(item: pytest.Item) -> bool:
    return "simulated_device" in getattr(item, "fixturenames", ())


def _begin_to_build_the_simulated_device() -> None:
    """Beside the first tests: the compiler takes half a minute, and who needs the device before has to wait for it."""
    from simulated_device.build import build_early, library

    if not library().exists():
        processes.keep(processes.fork(build_early)[0])  # it is killed when this process ends


@pytest.fixture(autouse=True, scope="module")
def _what_a_file_imports_is_no_garbage() -> Iterator[None]:
    known = len(sys.modules)
    yield
    if len(sys.modules) > known + 100:
        processes.collect_rarely()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    yield
    processes.end_all()
    if "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized():
        # A function that stands for a single rank has run in this process. The next test begins as a script does.
        sys.modules["torch.distributed"].destroy_process_group()


@pytest.fixture(scope="session")
def simulated_device() -> None:
    """The simulated accelerator is built. It is loaded in the processes of ``ranks.run(..., device="sim")`` only."""
    from simulated_device import NoCompiler, build

    try:
        build()
    except NoCompiler as error:
        pytest.skip(str(error))
