"""Pytest processes that share the files run each test once."""

import os
from pathlib import Path

import processes

_FILE = """
import time
import pytest

@pytest.fixture(scope="module")
def here():
    yield {number}

@pytest.mark.parametrize("k", range(3))
def test_it(here, k):
    with open("ran", "a") as file:
        file.write(f"{number} {{here}} {{k}}\\n")
    time.sleep(0.02)
    assert {number} != 5
"""


def test_each_file_runs_once_and_a_failure_is_told(tmp_path):
    for number in range(8):
        (tmp_path / f"test_{number}.py").write_text(_FILE.format(number=number))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    command = ("-m", "pytest", "-p", "sharing", "-p", "no:cacheprovider", "--share", tmp_path / "share", "-q")
    both = [processes.program(*command, environment=environment, cwd=tmp_path) for _ in range(2)]
    ends = [process.finish() for process in both]
    ran = sorted((tmp_path / "ran").read_text().split("\n")[:-1])
    assert ran == [f"{number} {number} {k}" for number in range(8) for k in range(3)]
    assert sorted(code for code, _, _ in ends) == [0, 1], ends  # one had the file that fails
    assert sum(out.count("FAILED test_5.py") for _, out, _ in ends) == 3
