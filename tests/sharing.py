"""Several pytest processes share the test files: ``pytest --share FOLDER``, as often as there are cores to use.

Each takes the next file that nobody has taken, so they end at about the same time whatever the files take. A file is
never split: its fixtures, and the pools of ranks, are a process's own.
"""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share", type=Path, metavar="FOLDER",
        help="run only the files that no other pytest with this FOLDER runs; a new one for each run of the tests",
    )  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--share")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        config.pluginmanager.register(_Share(folder), "share")


class _Share:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._mine: dict[Path, bool] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Have pytest pass over what is another's: ``True`` says that the test has been dealt with."""
        if item.path not in self._mine:
            self._mine[item.path] = self._take(item)
        return None if self._mine[item.path] else True

    def _take(self, item: pytest.Item) -> bool:
        name = item.nodeid.partition("::")[0].replace("/", ".")
        try:
            (self._folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
