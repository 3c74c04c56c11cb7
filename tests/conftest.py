"""What holds for every test."""

import os
from collections.abc import Iterator

import pytest

import processes

pytest_plugins = ["sharing"]

# With it, a print() is two writes, and the lines of several processes that share a pipe come out mixed.
os.environ.pop("PYTHONUNBUFFERED", None)
# Before torch is imported. The models are tiny: more threads only wait for each other, long on a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def _no_process_is_left_behind() -> Iterator[None]:
    yield
    processes.end_all()


@pytest.fixture(scope="session")
def simulated_device() -> None:
    """The simulated accelerator is built. It is loaded in the processes of ``ranks.run(..., device="sim")`` only."""
    from simulated_device import NoCompiler, build

    try:
        build()
    except NoCompiler as error:
        pytest.skip(str(error))
