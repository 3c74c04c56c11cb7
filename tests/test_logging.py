"""The rank-aware logger: who writes, in which order, and from where."""

from __future__ import annotations

import io
import logging
import time

import pytest

import processes
from models import rank
from ranks import run
from shardwise import ShardwiseError
from shardwise.logging import get_logger


class Lines(logging.Handler):
    """Appends lines to a file that all ranks share, or to a list."""

    def __init__(self, path=None):
        super().__init__()
        self.path, self.records = path, []

    def emit(self, record):
        self.records.append(record)
        if self.path is not None:
            with open(self.path, "a") as file:
                file.write(self.format(record) + "\n")


def logger_to(handler, name="test.logging", level="INFO"):
    logger = get_logger(name, log_level=level)
    logger.logger.handlers, logger.logger.propagate = [handler], False
    return logger


def said(handler):
    return [record.getMessage() for record in handler.records]


def each_rank_logs():
    handler = Lines()
    logger = logger_to(handler)
    logger.info("main %d", 1)
    logger.info("all", main_process_only=False)
    logger.debug("below the level", main_process_only=False)
    for _ in range(3):
        logger.warning_once("once %s", "a")
    logger.warning_once("once %s", "b")
    return said(handler)


def test_rank_0_only_unless_told_otherwise():
    first, second = run(2, each_rank_logs)
    assert first == ["[RANK 0] main 1", "[RANK 0] all", "[RANK 0] once a", "[RANK 0] once b"]
    assert second == ["[RANK 1] all"]


def in_order_to_one_file(path):
    logger = logger_to(Lines(path))
    for turn in range(3):
        time.sleep(0.05 * (2 - rank()))  # the last rank is ready first
        logger.info("turn %d", turn, in_order=True)
    quiet = logger_to(Lines(path), "test.quiet", "INFO" if rank() == 1 else "ERROR")
    quiet.info("the loud one", in_order=True)  # levels differ: the others still take part


def test_in_order(tmp_path):
    path = tmp_path / "lines.txt"
    run(3, in_order_to_one_file, str(path))
    wanted = [f"[RANK {r}] turn {turn}" for turn in range(3) for r in range(3)]
    assert path.read_text().splitlines() == [*wanted, "[RANK 1] the loud one"]


def test_file_line_and_extra_are_the_callers():
    handler = Lines()
    logger = logger_to(handler)
    logger.info("here", extra={"epoch": 3})
    logger.warning_once("there")
    logger.log(logging.ERROR, "direct")
    code = test_file_line_and_extra_are_the_callers.__code__
    lines = [record.lineno - code.co_firstlineno for record in handler.records]
    assert {record.funcName for record in handler.records} == {code.co_name}
    assert lines == [3, 4, 5] and handler.records[0].epoch == 3


def test_only_the_named_logger_gets_the_level():
    before = logging.getLogger().level
    assert get_logger("test.levels", log_level="debug").getEffectiveLevel() == logging.DEBUG
    assert logging.getLogger().level == before
    with pytest.raises(ShardwiseError, match="'loud' is not a log level"):
        get_logger("test.levels", log_level="loud")


def test_the_environment_sets_a_level(monkeypatch):
    monkeypatch.setenv("SHARDWISE_LOG_LEVEL", "error")
    assert get_logger("test.env").getEffectiveLevel() == logging.ERROR
    monkeypatch.setenv("SHARDWISE_LOG_LEVEL", "x")
    with pytest.raises(ShardwiseError, match="SHARDWISE_LOG_LEVEL: 'x' is not a log level"):
        get_logger("test.env")


BEFORE = """
import os, sys, logging
os.environ.update(RANK=sys.argv[1], WORLD_SIZE="2", LOCAL_RANK=sys.argv[1], MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
logging.basicConfig(stream=sys.stdout, level="INFO", format="%(message)s")
from shardwise.logging import get_logger
logger = get_logger("before")
logger.info("rank 0 only")
logger.info("all", main_process_only=False)
try:
    logger.info("never", in_order=True)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_works_before_the_ranks_have_joined(tmp_path):
    """Accelerate raises here. Rank facts come from the launcher; only a collective needs the process group."""
    script = tmp_path / "before.py"
    script.write_text(BEFORE)
    both = [processes.script(script, rank, number=rank) for rank in range(2)]
    first, second = (process.finish()[1].splitlines() for process in both)
    assert first[:2] == ["[RANK 0] rank 0 only", "[RANK 0] all"]
    assert second[0] == "[RANK 1] all"
    for lines in (first, second):
        assert any("CommError" in line and "in_order=True needs the process group" in line for line in lines)


def test_plain_streams_work():
    stream = io.StringIO()
    logger = logger_to(logging.StreamHandler(stream))
    logger.error("100%% of %s", "it")
    assert stream.getvalue() == "[RANK 0] 100% of it\n"
