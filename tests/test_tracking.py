"""Trackers: what they write can be read back, one rank writes it, and nothing is lost without a word.

TensorBoard and JSONL here; the other clients in ``test_tracker_clients.py``.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from models import rank
from ranks import run
from shardwise import Accelerator, ShardwiseError
from shardwise.tracking import (
    LOGGER_TYPE_TO_CLASS,
    CSVTracker,
    GeneralTracker,
    JSONLTracker,
    LoggerType,
    TensorBoardTracker,
    get_available_trackers,
    on_main_process,
    register_tracker_class,
)


class Kind(Enum):
    A = "a"


class ListTracker(GeneralTracker):
    """A script's own tracker."""

    name = "list"
    requires_logging_directory = False

    def __init__(self, run_name="run"):
        super().__init__()
        self.run_name, self.calls, self.configs = run_name, [], []
        self.started = self.finished = 0

    @property
    def tracker(self):
        return self.calls

    def start(self):
        self.started += 1

    @on_main_process
    def store_init_configuration(self, values):
        self.configs.append(values)

    @on_main_process
    def log(self, values, step=None, **kwargs):
        self.calls.append((values, step, kwargs))

    @on_main_process
    def finish(self):
        self.finished += 1


class EveryRank(ListTracker):
    name = "every"
    main_process_only = False


class AsInTheDocs(GeneralTracker):
    """Nothing exists on other ranks, and the base's constructor is never called."""

    name = "docs"
    requires_logging_directory = False

    @on_main_process
    def __init__(self, run_name: str):
        self.run_name, self.lines = run_name, []

    @property
    def tracker(self):
        return self.lines

    @on_main_process
    def log(self, values, step=None):
        self.lines.append((values, step))


def accelerator(log_with, folder=None, **kwargs):
    return Accelerator(cpu=True, log_with=log_with, project_dir=None if folder is None else str(folder), **kwargs)


def no_constants(name):
    raise AssertionError(f"{name} is no JSON")


def lines_of(path):
    return [json.loads(line, parse_constant=no_constants) for line in Path(path).read_text().splitlines()]


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    return events.Reload()


# --- JSONL ---------------------------------------------------------------------------------------
def test_jsonl_can_be_read_back_by_strict_readers(tmp_path):
    acc = accelerator("jsonl", tmp_path)
    config = {"lr": 0.1, "path": Path("x"), "none": None, "list": (1, 2), "kind": Kind.A, "dtype": torch.float32,
              "inf": float("inf"), "nested": {"n": np.int64(3)}}  # fmt: skip
    acc.init_trackers("a run", config)
    acc.log({"loss": torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), "np": np.float32(0.25), "n": 3}, 7)
    acc.log({"bad": torch.tensor(float("nan")), "up": float("inf"), "down": -np.inf, "text": "é\n", "no": None})
    acc.log({"split": {"a": torch.tensor([1.0]), "b": 2}, "row": torch.arange(3), "ok": True}, step=np.int64(8))
    folder = tmp_path / "a run"
    written = lines_of(folder / "metrics.jsonl")  # before the end: lines are there when log returns
    acc.end_training()
    assert [line["step"] for line in written] == [7, None, 8]
    assert [line["values"] for line in written] == [
        {"loss": 0.5, "np": 0.25, "n": 3},
        {"bad": "NaN", "up": "Infinity", "down": "-Infinity", "text": "é\n", "no": None},
        {"split": {"a": 1.0, "b": 2}, "row": [0, 1, 2], "ok": True},
    ]
    assert written[0]["time"] <= written[1]["time"] <= written[2]["time"]
    assert json.loads((folder / "config.json").read_text(), parse_constant=no_constants) == {
        "lr": 0.1, "path": "x", "none": None, "list": [1, 2], "kind": "a", "dtype": "torch.float32",
        "inf": "Infinity", "nested": {"n": 3},
    }  # fmt: skip


def test_jsonl_continues_a_file_and_a_torn_line_stays_alone(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    for turn in range(2):
        acc = accelerator(LoggerType.JSONL, tmp_path)
        acc.init_trackers("run", {"lr": turn, f"only_{turn}": 1})
        acc.log({"turn": turn}, step=turn)
        acc.end_training()
    with path.open("a") as file:
        file.write('{"step": 2, "val')  # killed here
    acc = accelerator("jsonl", tmp_path)
    acc.init_trackers("run")
    acc.log({"turn": 2})
    acc.log({"turn": 3})
    lines = path.read_text().splitlines()
    assert [json.loads(line)["values"]["turn"] for i, line in enumerate(lines) if i != 2] == [0, 1, 2, 3]
    assert lines[2] == '{"step": 2, "val'
    assert json.loads((path.parent / "config.json").read_text()) == {"lr": 1, "only_0": 1, "only_1": 1}


def test_jsonl_says_what_it_cannot_do(tmp_path, caplog):
    acc = accelerator("jsonl", tmp_path)
    acc.init_trackers("run")
    for _ in range(2):
        acc.log({"ok": 1, "figure": object()})
    assert [line["values"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == [{"ok": 1}, {"ok": 1}]
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1 and "'jsonl' leaves out 'figure'" in warned[0] and "not a object" in warned[0]
    tracker = acc.get_tracker("jsonl")
    with pytest.raises(ShardwiseError, match="cannot hold images"):
        tracker.log_images({"x": []})
    with pytest.raises(ShardwiseError, match="cannot hold tables"):
        tracker.log_table("x", data=[])
    for wrong, message in (([1], "takes a dict"), ({1: 2}, "the name 1 is a int")):
        with pytest.raises(ShardwiseError, match=message):
            acc.log(wrong)
    with pytest.raises(ShardwiseError, match=r"step=0\.5 is not a whole number"):
        acc.log({"x": 1}, step=0.5)
    with pytest.raises(ShardwiseError, match="configuration is a list"):
        tracker.store_init_configuration([1])
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(ShardwiseError, match="earlier run cannot be read"):
        tracker.store_init_configuration({"a": 1})


def test_csv_has_a_file_for_each_name(tmp_path, caplog):
    for turn in range(2):  # the second one goes on
        acc = accelerator("csv", tmp_path)
        acc.init_trackers("run", {"lr": 0.1})
        acc.log({"Train/loss rate": torch.tensor(0.5), "split": {"a": 1}, "word": "x"}, step=turn)
        acc.log({"Train/loss rate": 0.25})
        acc.end_training()
    folder = tmp_path / "run"
    assert (folder / "Train_loss_rate.csv").read_text() == "step,loss rate\n0,0.5\n1,0.25\n1,0.5\n2,0.25\n"
    assert (folder / "split_a.csv").read_text() == "step,a\n0,1\n1,1\n"
    assert sorted(p.name for p in folder.iterdir()) == ["Train_loss_rate.csv", "config.json", "split_a.csv"]
    assert "'csv' leaves out 'word'" in caplog.text
    tracker = CSVTracker("run", tmp_path)
    with pytest.raises(ShardwiseError, match="does not run"):
        tracker.log({"x": 1})
    with pytest.raises(ShardwiseError, match="cannot hold images"):
        tracker.log_images({})
    (tmp_path / "other").write_text("a file")
    with pytest.raises(ShardwiseError, match="cannot be written"):
        CSVTracker("other", tmp_path).start()


@pytest.mark.parametrize("name", ["jsonl"])
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, name):
    (tmp_path / "run").write_text("a file")
    acc = accelerator(name, tmp_path)
    with pytest.raises(ShardwiseError, match=r"metrics\.jsonl: cannot be written"):
        acc.init_trackers("run")
    with pytest.raises(ShardwiseError, match="before init_trackers"):
        acc.log({"x": 1})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error(tmp_path):
    tracker = JSONLTracker("run", tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    tracker.start()
    with pytest.raises(ShardwiseError, match="No space left"):
        tracker.log({"x": 1})


# --- TensorBoard ---------------------------------------------------------------------------------
def test_tensorboard_can_be_read_back(tmp_path, caplog):
    acc = accelerator("tensorboard", tmp_path)
    acc.init_trackers("run", {"lr": 0.1, "path": Path("x"), "none": None, "list": [1], "deep": {"n": 3}},
                      {"tensorboard": {"flush_secs": 1}})  # fmt: skip
    live = events_of(tmp_path / "run")  # somebody looks on while the run goes on
    acc.log({"loss": torch.tensor(0.5), "text": "hello", "both": {"a": 1, "b": torch.tensor(2.0)}}, step=3)
    acc.log({"loss": np.float64(0.25), "nan": float("nan"), "row": torch.arange(3)}, step=torch.tensor(5))
    acc.log({"loss": 7})  # no step: the next
    small, large = np.full((4, 6, 3), 255, np.uint8), np.zeros((8, 6), np.uint8)
    tracker = acc.get_tracker("tensorboard")
    tracker.log_images({"same": [small, small], "sizes": [small, large]}, step=9)
    tracker.log_images(
        {"stack": torch.zeros(2, 3, 4, 6), "last": torch.zeros(2, 4, 6, 3)[:, :, :, :3].permute(0, 3, 1, 2)}
    )
    assert len(live.Reload().Scalars("loss")) == 3
    acc.get_tracker("tensorboard", unwrap=True).add_scalar("direct", 1.0, 1)
    assert tracker.writer is tracker.tracker
    acc.end_training()

    events = events_of(tmp_path / "run")
    loss = events.Scalars("loss")
    assert [(e.step, e.value) for e in loss] == [(3, 0.5), (5, 0.25), (6, 7.0)]
    assert np.isnan(events.Scalars("nan")[0].value) and events.Scalars("direct")[0].value == 1.0
    assert events.Tensors("text/text_summary")[0].tensor_proto.string_val == [b"hello"]
    images = {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}
    assert images == {"same": [9], "sizes/0": [9], "sizes/1": [9], "stack": [10], "last": [10]}
    assert {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()} >= {"both_a", "both_b"}
    assert events_of(tmp_path / "run" / "both_b").Scalars("both")[0].value == 2.0
    plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert all(word in plugin for word in (b"lr", b"path", b"deep/n", b"[1]"))
    assert json.loads((tmp_path / "run" / "hparams.yml").read_text())["deep"] == {"n": 3}
    warned = [r.getMessage() for r in caplog.records if "leaves out" in r.getMessage()]
    assert len(warned) == 1 and "'row'" in warned[0] and "Tensor of several elements" in warned[0]


# --- ranks ---------------------------------------------------------------------------------------
def on_ranks(folder):
    everywhere, mine, docs = EveryRank(), ListTracker(), AsInTheDocs("run")
    acc = accelerator(["jsonl", "tensorboard", everywhere, mine, docs], folder)
    acc.init_trackers("run", {"ranks": 2})
    acc.log({"rank": rank()}, step=1, log_kwargs={"every": {"more": 1}})
    blank = acc.get_tracker("tensorboard", unwrap=True)
    blank.add_scalar("direct", 2.0, 0)
    if rank() > 0:
        with copy.deepcopy(blank).some.thing(1)["a"].more as inner:
            inner.x = 3
        assert list(blank.log({"x": 1}).x) == []
    acc.get_tracker("jsonl").log({"direct": 3})
    acc.get_tracker("docs").log({"direct": 3})
    try:
        acc.get_tracker("wandb")
    except ShardwiseError as error:
        message = str(error)
    acc.end_training()
    return {
        "message": message,
        "names": [t.name for t in acc.trackers],
        "every": (everywhere.started, everywhere.configs, everywhere.calls, everywhere.finished),
        "mine": (mine.started, mine.configs, mine.calls, mine.finished),
        "docs": getattr(docs, "lines", None),
    }


def test_rank_0_writes_and_other_ranks_get_blanks(tmp_path):
    first, second = run(2, on_ranks, str(tmp_path))
    assert first["names"] == ["jsonl", "tensorboard", "every", "list", "docs"] and second["names"] == ["every"]
    assert [line["values"] for line in lines_of(tmp_path / "run" / "metrics.jsonl")] == [{"rank": 0}, {"direct": 3}]
    files = [p.name for p in (tmp_path / "run").iterdir() if p.name.startswith("events")]
    assert len(files) == 1
    assert events_of(tmp_path / "run").Scalars("rank")[0].value == 0.0
    for r, result in enumerate((first, second)):
        assert result["every"] == (1, [{"ranks": 2}], [({"rank": r}, 1, {"more": 1})], 1)
        assert (
            "no tracker 'wandb' was initialised; there are jsonl, tensorboard, every, list, docs" in result["message"]
        )
    assert first["mine"] == (1, [{"ranks": 2}], [({"rank": 0}, 1, {})], 1) and second["mine"] == (0, [], [], 0)
    assert first["docs"] == [({"rank": 0}, 1), ({"direct": 3}, None)] and second["docs"] is None


# --- asking for trackers -------------------------------------------------------------------------
def test_custom_trackers_get_what_the_script_logged(tmp_path):
    tracker = ListTracker()
    acc = accelerator([tracker, "jsonl", "jsonl", LoggerType.JSONL], tmp_path)
    assert acc.log_with == [tracker, LoggerType.JSONL]  # each once
    acc.init_trackers("run", {"a": 1})
    loss = torch.tensor(1.0)
    acc.log({"loss": loss}, step=2, log_kwargs={"list": {"epoch": 1}})
    assert tracker.calls[0][0]["loss"] is loss and tracker.calls[0][1:] == (2, {"epoch": 1})
    assert acc.get_tracker("list") is tracker and acc.get_tracker("list", unwrap=True) is tracker.calls
    acc.init_trackers("another")  # ends what the first call opened; the script's own tracker goes on
    acc.log({"x": 1})
    assert (tracker.started, tracker.finished, len(tracker.calls)) == (1, 0, 2)
    assert len(lines_of(tmp_path / "run" / "metrics.jsonl")) == len(lines_of(tmp_path / "another" / "metrics.jsonl"))
    acc.end_training()
    acc.end_training()
    assert tracker.finished == 1
    for call in (lambda: acc.log({"x": 1}), lambda: acc.get_tracker("list")):
        with pytest.raises(ShardwiseError, match="after end_training"):
            call()
    acc.init_trackers("again")
    assert tracker.started == 2


def test_incomplete_classes_are_named():
    class Half(GeneralTracker):
        name = "half"

    class WithoutConstructor(GeneralTracker):
        def __init__(self):
            pass

    with pytest.raises(ShardwiseError, match="Half: the tracker class lacks `requires_logging_directory`, `tracker`"):
        Half()
    with pytest.raises(ShardwiseError, match="lacks `name`, `requires_logging_directory`, `tracker`"):
        accelerator(WithoutConstructor())
    with pytest.raises(ShardwiseError, match="the class ListTracker is no tracker"):
        accelerator(ListTracker)
    GeneralTracker(_blank=True).log({})


@pytest.mark.parametrize(
    ("log_with", "folder", "message"),
    [
        ("tensorbord", "x", "did you mean 'tensorboard'"),
        (["jsonl", "zzz"], "x", "one of aim"),
        (3, "x", "a int is no tracker"),
        ("tensorboard", None, r"pass Accelerator\(project_dir="),
        ("jsonl", None, r"pass Accelerator\(project_dir="),
    ],
)
def test_wrong_requests(log_with, folder, message):
    with pytest.raises(ShardwiseError, match=message):
        accelerator(log_with, folder)


@pytest.mark.parametrize("name", sorted(set(LOGGER_TYPE_TO_CLASS) - {"jsonl", "csv"}))
def test_a_client_that_is_not_installed_is_an_error_with_the_pip_line(monkeypatch, name, tmp_path):
    for module in (name, "tensorboardX"):
        monkeypatch.setitem(sys.modules, module, None)
    assert LoggerType(name) not in get_available_trackers()
    with pytest.raises(ShardwiseError, match=f"fix: pip install '?{name}"):
        accelerator(name, tmp_path)
    tracker = LOGGER_TYPE_TO_CLASS[name]("run", *([tmp_path] if name in ("aim", "tensorboard") else []))
    with pytest.raises(ImportError, match="pip install"):
        tracker.start()


def test_all(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    for name in set(LOGGER_TYPE_TO_CLASS) - {"jsonl", "csv", "tensorboard"}:
        monkeypatch.setitem(sys.modules, name, None)
    tracker = ListTracker()
    assert accelerator(["all", tracker], tmp_path).log_with == [LoggerType.TENSORBOARD, LoggerType.JSONL, tracker]
    assert "log_with='all' logs with tensorboard, jsonl" in caplog.text
    with pytest.raises(ShardwiseError, match="'tensorboard' writes files and no folder was given"):
        accelerator("all")
    for name in ("tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    assert accelerator(LoggerType.ALL, tmp_path).log_with == [LoggerType.JSONL]
    with pytest.raises(ShardwiseError, match="no tracker's client is installed"):
        accelerator("all")


def test_without_trackers_nothing_is_needed():
    acc = accelerator(None)
    acc.init_trackers("run", {"a": 1}, {"wandb": {"name": "x"}})
    acc.log({"x": 1})
    acc.get_tracker("wandb").run.log_artifact("x")
    acc.end_training()
    assert acc.trackers == []


def test_calls_out_of_order_and_misspelt_settings(tmp_path, caplog):
    acc = accelerator(["jsonl", ListTracker()], tmp_path)
    for call in (lambda: acc.log({"x": 1}), lambda: acc.get_tracker("jsonl")):
        with pytest.raises(ShardwiseError, match="before init_trackers"):
            call()
    with pytest.raises(ShardwiseError, match="does not run"):
        _ = TensorBoardTracker("run", tmp_path).tracker
    with pytest.raises(ShardwiseError, match="init_kwargs: no tracker is called 'wandbb'"):
        acc.init_trackers("run", init_kwargs={"wandbb": {}})
    with pytest.raises(ShardwiseError, match="settings for 'jsonl' are a int"):
        acc.init_trackers("run", init_kwargs={"jsonl": 3})
    acc.init_trackers("run", init_kwargs={"wandb": {"name": "x"}, "list": {"a": 1}})  # wandb is not in use: fine
    assert "init_kwargs for 'list' have no effect" in caplog.text
    with pytest.raises(ShardwiseError, match="log_kwargs: no tracker is called 'json'"):
        acc.log({"x": 1}, log_kwargs={"json": {}})


class Failing(ListTracker):
    def __init__(self, where, name):
        super().__init__()
        self.where, self.name = where, name

    def start(self):
        super().start()
        if self.where == "start":
            raise ConnectionError("the network is down")

    def log(self, values, step=None):
        if self.where == "log":
            raise ConnectionError("the network is down")
        super().log(values, step)

    def finish(self):
        super().finish()
        if self.where == "finish":
            raise ConnectionError("the network is down")


@pytest.mark.parametrize("where", ["start", "log", "finish"])
def test_a_failing_client_is_heard_and_the_others_are_finished(where):
    before, failing, after = ListTracker(), Failing(where, "failing"), Failing("", "after")
    acc = accelerator([before, failing, after])

    def script():
        acc.init_trackers("run")
        try:
            acc.log({"x": 1})
        finally:
            acc.end_training()

    with pytest.raises(ConnectionError, match="the network is down"):
        script()
    assert before.finished == 1 and after.finished == after.started


def test_registered_classes_can_be_asked_for_by_name(tmp_path, monkeypatch):
    class Mine(ListTracker):
        name = "mine"
        requires_logging_directory = True

        def __init__(self, run_name, logging_dir, color=None):
            super().__init__(run_name)
            self.logging_dir, self.color = logging_dir, color

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "mine", ListTracker)  # taken back after the test
    with pytest.warns(UserWarning, match="'mine' is replaced by Mine"):
        register_tracker_class(Mine)
    acc = accelerator("mine", tmp_path)
    acc.init_trackers("run", init_kwargs={"mine": {"color": "red"}})
    tracker = acc.get_tracker("mine")
    assert (tracker.run_name, tracker.logging_dir, tracker.color) == ("run", str(tmp_path), "red")
    with pytest.raises(ShardwiseError, match="no folder was given"):
        accelerator("mine")
    for wrong in (ListTracker(), int):
        with pytest.raises(ShardwiseError, match="no subclass of GeneralTracker"):
            register_tracker_class(wrong)


def test_accelerates_own_classes_work_too(tmp_path):
    tracking = pytest.importorskip("accelerate.tracking")
    from accelerate.utils import LoggerType as Theirs

    class OfAccelerate(tracking.GeneralTracker):
        name = "theirs"
        requires_logging_directory = False

        def __init__(self):
            super().__init__()
            self.calls = []

        @property
        def tracker(self):
            return self.calls

        def log(self, values, step=None, **kwargs):
            self.calls.append((values, step))

    acc = accelerator([OfAccelerate(), Theirs.TENSORBOARD], tmp_path)
    acc.init_trackers("run")
    acc.log({"x": 1}, step=1)
    assert acc.get_tracker("theirs", unwrap=True) == [({"x": 1}, 1)]
    acc.end_training()
    assert events_of(tmp_path / "run").Scalars("x")[0].value == 1.0
