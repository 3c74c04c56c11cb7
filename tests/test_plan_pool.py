"""Many predictions by few processes: in order, whatever becomes of a process on the way."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from processes import alive, fork
from shardwise.errors import PlanError
from shardwise.plan.pool import each


def done(item: int | str) -> tuple[int, int]:
    if item == "refused":
        raise PlanError("no such plan")
    if item == "raised":
        raise ZeroDivisionError("of the model")
    if item == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    return item, os.getpid()


def test_a_process_goes_on_with_the_next_item():
    found = list(each(done, range(8), processes=2))
    assert [item for item, _ in found] == list(range(8))
    pids = {pid for _, pid in found}
    assert 1 <= len(pids) <= 2 and os.getpid() not in pids
    assert not any(map(alive, pids))


@pytest.mark.parametrize("processes", [1, 2, 20])
def test_what_ends_or_refuses_is_one_result_and_the_others_are_there(processes):
    items = [0, "killed", 1, "refused", 2, "raised", "killed", 3, "killed"]
    found = list(each(done, items, processes=processes))
    assert [one[0] for one in found if not isinstance(one, PlanError)] == [0, 1, 2, 3]
    said = {items[k]: str(one) for k, one in enumerate(found) if isinstance(one, PlanError)}
    assert said.keys() == {"killed", "refused", "raised"}
    assert said["refused"] == "no such plan" and "of the model" in said["raised"] and "has ended" in said["killed"]


def test_nothing_to_do():
    assert list(each(done, [])) == []


def slowly(item: tuple[str, int]) -> int:
    folder, number = item
    Path(folder, str(os.getpid())).touch()
    time.sleep(0.05 if number < 2 else 600)
    return number


def test_nobody_is_left_when_the_rest_is_not_wanted(tmp_path):
    found = each(slowly, [(str(tmp_path), number) for number in range(5)], processes=2)
    assert [next(found), next(found)] == [0, 1]
    found.close()
    assert not any(alive(int(file.name)) for file in tmp_path.iterdir())


def briefly(item: tuple[str, int]) -> int:
    folder, number = item
    Path(folder, str(os.getpid())).touch()
    time.sleep(1)
    return number


def in_a_process(folder: str) -> None:
    list(each(briefly, [(folder, number) for number in range(100)], processes=2))


def test_nobody_goes_on_when_whoever_asked_is_killed(tmp_path):
    asking, _ = fork(in_a_process, str(tmp_path))
    asking.until(lambda: len(list(tmp_path.iterdir())) == 2)
    os.kill(asking.pid, signal.SIGKILL)
    end = time.monotonic() + 30
    while any(alive(int(file.name)) for file in tmp_path.iterdir()):
        assert time.monotonic() < end
        time.sleep(0.05)
