"""What a run leaves in its record: driven by hand here, event by event."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import shardwise
from models import forget_compiled, loss_of, make
from shardwise import events
from shardwise.observe.digest import PHASE, START, WAIT, WAITED, Sums, timeline
from shardwise.observe.record import Recorder
from shardwise.observe.record_file import RecordFile, file_of

KINDS = ("run", "model", "step", "timeline", "end")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def of_kind(found: list[dict], kind: str) -> list[dict]:
    assert {line["kind"] for line in found} <= set(KINDS)
    return [line for line in found if line["kind"] == kind]


def recorder(folder: Path, **settings) -> tuple[Recorder, Path]:
    path = file_of(folder, "run", 0)
    return Recorder(RecordFile(path), {"run": "run", "rank": 0, "world": 1}, torch.device("cpu"), **settings), path


def one_step(told: Recorder, micro_batches: int = 1, loss: float | None = None) -> None:
    for _ in range(micro_batches):
        told.given(2, 10)
        told.phase("forward", "'(root)'")
        told.start("gather", "unit 'a'", 100, (0, 1))
        told.wait("gather", "unit 'a'")
        told.waited("gather", "unit 'a'")
        told.phase("", "")
        if loss is not None:
            told.tell(loss=torch.tensor(loss))
        told.phase("backward", "'(root)'")
        told.phase("", "")
    told.phase("step", "AdamW")
    told.phase("", "")


def test_a_step_is_from_the_end_of_one_to_the_end_of_the_next(tmp_path):
    told, path = recorder(tmp_path, flops=False)
    for index in range(3):
        one_step(told, micro_batches=2, loss=float(index))
        told.tell({"lr": 0.5 + index, "text": "is passed over"})
        time.sleep(0.01)
    told.close()
    told.close()
    found = lines(path)
    assert [line["kind"] for line in found] == ["run", "step", "step", "timeline", "step", "end"]
    steps = of_kind(found, "step")
    assert [s["step"] for s in steps] == [1, 2, 3] and all(s["steps"] == 1 for s in steps)
    assert [s["loss"] for s in steps] == [0.0, 1.0, 2.0]
    assert [s["values"] for s in steps] == [{"lr": 0.5}, {"lr": 1.5}, {"lr": 2.5}]
    for before, step in pairwise(steps):
        assert step["start"] == before["end"] and step["seconds"]["outside"] >= 0.01
    for step in steps:
        assert sum(step["seconds"].values()) == pytest.approx(step["end"] - step["start"], abs=2e-5)
        assert step["sent"] == {"gather": 200} and (step["micro_batches"], step["rows"], step["tokens"]) == (2, 4, 20)
        assert 0 < step["waits"]["gather"] < step["seconds"]["forward"]


def test_evaluation_and_recomputing_have_names_of_their_own(tmp_path):
    told, path = recorder(tmp_path, flops=False)
    one_step(told)
    with torch.no_grad():
        for _ in range(2):
            told.phase("forward", "'(root)'")
            told.phase("", "")
            time.sleep(0.01)
    told.phase("forward", "'(root)'")
    told.phase("", "")
    told.phase("backward", "'a'")
    told.phase("forward", "'a'")  # under activation checkpointing
    told.phase("backward", "'a'")
    told.phase("", "")
    told.phase("step", "AdamW")
    told.phase("", "")
    told.close()
    first, second = of_kind(lines(path), "step")
    assert "evaluation" not in first["seconds"]
    assert second["seconds"]["evaluation"] >= 0.02 > second["seconds"]["outside"]
    assert second["micro_batches"] == 1 and second["seconds"]["recompute"] > 0


def test_optimizers_that_step_one_after_the_other_make_one_step_and_a_closure_does_too(tmp_path):
    told, path = recorder(tmp_path, flops=False)
    one_step(told)
    told.phase("step", "SGD")
    told.phase("", "")
    told.phase("forward", "'(root)'")
    told.phase("", "")
    told.phase("step", "SGD")  # which calls a closure
    told.phase("forward", "'(root)'")
    told.phase("", "")
    told.phase("backward", "'(root)'")
    told.phase("", "")
    told.phase("", "")
    told.close()
    assert [s["micro_batches"] for s in of_kind(lines(path), "step")] == [1, 2]


def test_a_killed_run_leaves_whole_lines(tmp_path):
    told, path = recorder(tmp_path, flops=False)
    one_step(told, loss=1.0)
    one_step(told, loss=float("nan"))
    time.sleep(0.6)  # what is older than that is in the file
    one_step(told)
    one_step(told)
    found = lines(path)  # nobody closed it
    assert [line["kind"] for line in found][:3] == ["run", "step", "step"] and not of_kind(found, "end")
    assert found[2]["loss"] == "NaN"
    told.close()


def test_long_runs_have_few_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("shardwise.observe.record_file._LINES", 8)
    told, path = recorder(tmp_path, flops=False, every=10)
    for index in range(100):
        one_step(told, loss=float(index))
    told.close()
    found = lines(path)
    steps = of_kind(found, "step")
    assert sum(s["steps"] for s in steps) == 100 and len(steps) < 8 * 5 and steps[-1]["step"] == 100
    assert sum(s["tokens"] for s in steps) == 1000 and sum(s["sent"]["gather"] for s in steps) == 10_000
    for before, step in pairwise(steps):
        assert step["step"] == before["step"] + step["steps"] and step["start"] == before["end"]
    paired = next(s for s in steps if s["steps"] == 2)
    assert paired["loss"] == paired["step"] - 1.5  # of the two
    full = [t["step"] for t in of_kind(found, "timeline")]
    assert full[:4] == [3, 4, 5, 10] and len(full) == 13


def test_sums_count_a_wait_inside_another_once_and_none_of_other_threads():
    sums = Sums(1)
    sums.restart(0.0)
    sums.take(
        [
            (1.0, PHASE, "step", "AdamW", (5,), 1),
            (2.0, WAIT, "update", "a", None, 1),
            (3.0, WAIT, "read", "b", None, 1),
            (3.5, WAIT, "read", "c", None, 2),
            (4.0, WAITED, "read", "b", None, 1),
            (5.0, WAITED, "update", "a", None, 1),
            (9.0, WAITED, "read", "c", None, 2),
            (10.0, PHASE, "outside", "", (3,), 1),
        ]
    )
    sums.until(11.0)
    assert sums.seconds == {"outside": 2.0, "step": 9.0} and sums.waits == {"update": 3.0}
    assert sums.peak == [5, 5] and list(sums.live) == [3]


def test_a_timeline_pairs_transfers_in_their_order():
    line = timeline(
        7,
        [
            (1.0, PHASE, "forward", "'a'", (5,), 1),
            (1.5, START, "gather", "'b'", 10, 1),
            (2.0, START, "gather", "'b'", 20, 1),
            (2.5, WAIT, "gather", "'b'", None, 1),
            (3.0, WAITED, "gather", "'b'", None, 1),
            (3.5, PHASE, "outside", "", (5,), 1),
        ],
        zero=1.0,
        most=5,
    )
    names = line["names"]
    assert [(names[t[2]], names[t[3]], t[0], t[1], t[4]) for t in line["transfers"]] == [
        ("gather", "'b'", 500_000, 2_000_000, 10),
        ("gather", "'b'", 1_000_000, None, 20),
    ]
    assert [w[:2] + w[4:] for w in line["waits"]] == [[1_500_000, 2_000_000, 0]]
    assert line["memory"] == [[0, 5]] and line["left_out"] == 1


def test_operations_are_counted_in_the_second_step_and_numbers_stay_the_same(tmp_path):
    """Against torch's own counter, in a plain model."""
    from torch.utils.flop_counter import FlopCounterMode

    forget_compiled()
    plain = make(odd=False)
    ids = torch.randint(0, 31, (2, 6))
    with FlopCounterMode(display=False) as oracle:
        loss_of(plain, ids).backward()
    told, path = recorder(tmp_path)
    model = make(odd=False)
    for _ in range(3):
        model.zero_grad()
        told.given(2, 10)
        told.phase("forward", "'(root)'")
        loss = loss_of(model, ids)
        told.phase("", "")
        told.phase("backward", "'(root)'")
        loss.backward()
        told.phase("", "")
        told.phase("step", "AdamW")
        told.phase("", "")
    told.close()
    steps = of_kind(lines(path), "step")
    assert [s["flops"] for s in steps] == [None, oracle.get_total_flops(), oracle.get_total_flops()]
    assert [s["counting"] for s in steps] == [False, True, False]
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_what_cannot_be_recorded_is_one_error_and_a_full_disk_is_none(tmp_path):
    model = shardwise.fully_shard(make(), strategy="ddp")
    (tmp_path / "a file").write_text("")
    with pytest.raises(shardwise.errors.RecordError, match="cannot be recorded there"):
        shardwise.record(model, tmp_path / "a file")
    assert not events.listeners
    with (
        shardwise.record(model, tmp_path / "one"),
        pytest.raises(shardwise.errors.RecordError, match="recorded already"),
    ):
        shardwise.record(model, tmp_path / "two")
    assert not events.listeners and len(list((tmp_path / "one").iterdir())) == 1
    told, path = recorder(tmp_path / "three", flops=False)
    told._file._file.close()
    told._file._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
    one_step(told)
    with pytest.warns(RuntimeWarning, match="not recorded any more"):
        told.close()
    assert len(lines(path)) == 1


def test_what_is_only_planned_is_no_part_of_a_record():
    heard: list[str] = []

    class Hears(events.Listener):
        def phase(self, phase: str, unit: str) -> None:
            heard.append(phase)

    with events.listening(Hears()):
        with events.listening(events.Listener(), alone=True):
            events.phase("forward", "a plan")
        events.phase("backward", "a run")
    assert heard == ["backward"] and not events.listeners


def test_an_event_costs_microseconds(tmp_path):
    """Of CPU time, writing included: half a one is usual, so that this fails for other orders of magnitude only."""
    told, _ = recorder(tmp_path, flops=False, every=1)
    best, steps = float("inf"), 50
    for _ in range(5):
        start = time.thread_time()
        for _ in range(steps):
            one_step(told, micro_batches=5)
        best = min(best, (time.thread_time() - start) / (steps * (5 * 7 + 2)))
    told.close()
    assert best < 50e-6
