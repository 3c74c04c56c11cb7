"""DeepSpeed's monitors on this library's trackers."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ranks import run
from shardwise.deepspeed.monitor import MonitorMaster, get_monitor_config
from shardwise.deepspeed.reports import Reports
from shardwise.deepspeed_config import read_ds_config
from shardwise.errors import ConfigError, ShardwiseError

EVENTS = [("Train/Samples/lr", 0.5, 8), ("Train/Samples/train_loss", 2.0, 8), ("Train/Samples/lr", 0.25, 16)]


def section(folder: Path, **more: Any) -> dict[str, Any]:
    return {"enabled": True, "output_path": str(folder), "job_name": "job", **more}


def written(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text().replace("\r", "") for path in folder.rglob("*.csv")}


def test_files_are_those_of_deepspeed(tmp_path, monkeypatch):
    master = MonitorMaster(get_monitor_config({"csv_monitor": section(tmp_path / "ours"), "wandb": {"enabled": False}}))
    master.write_events(EVENTS)
    assert master.enabled and written(tmp_path / "ours") == {
        "Train_Samples_lr.csv": "step,lr\n8,0.5\n16,0.25\n",
        "Train_Samples_train_loss.csv": "step,train_loss\n8,2.0\n",
    }
    master.close()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    from deepspeed import comm
    from deepspeed.monitor.config import CSVConfig
    from deepspeed.monitor.csv_monitor import csvMonitor

    monkeypatch.setattr(comm, "get_rank", lambda *a: 0)
    csvMonitor(CSVConfig(**section(tmp_path / "theirs"))).write_events(EVENTS)
    assert written(tmp_path / "theirs" / "job") == written(tmp_path / "ours" / "job")


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sections = SimpleNamespace(tensorboard=SimpleNamespace(**section(tmp_path)), comet=SimpleNamespace(enabled=False))
    master = MonitorMaster(sections)
    master.write_events(EVENTS)
    seen = EventAccumulator(str(tmp_path / "job")).Reload()
    assert [(e.step, e.value) for e in seen.Scalars("Train/Samples/lr")] == [(8, 0.5), (16, 0.25)]
    master.close()


def test_comet_after_so_many_samples(tmp_path, monkeypatch):
    pytest.importorskip("comet_ml")
    monkeypatch.setenv("COMET_OFFLINE_DIRECTORY", str(tmp_path))
    comet = {"enabled": True, "online": False, "samples_log_interval": 10, "project": "p", "experiment_name": "n"}
    master = MonitorMaster(get_monitor_config({"comet": comet}))
    master.write_events([("lr", float(step), step) for step in (0, 4, 8, 12, 16, 24)])
    master.close()
    (file,) = tmp_path.glob("*.zip")
    with zipfile.ZipFile(file) as archive:
        lines = [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]
    metrics = [line["payload"]["metric"] for line in lines if line["type"] == "metric_msg"]
    assert [m["metricValue"] for m in metrics if m["metricName"] == "lr"] == [0.0, 12.0, 24.0]


def on_ranks(folder: Path) -> bool:
    master = MonitorMaster({"csv_monitor": section(folder)})
    master.write_events(EVENTS)
    return master.enabled


def test_rank_0_writes(tmp_path):
    assert run(2, on_ranks, tmp_path) == [True, True]
    assert written(tmp_path)["Train_Samples_lr.csv"] == "step,lr\n8,0.5\n16,0.25\n"


def test_what_is_wrong_says_so(tmp_path, monkeypatch):
    assert not MonitorMaster({}).enabled
    MonitorMaster({}).write_events(EVENTS)
    with pytest.raises(ConfigError, match="did you mean 'job_name'"):
        get_monitor_config({"csv_monitor": {"enabled": True, "jobname": "x"}})
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardwiseError, match="cannot be written"):
        MonitorMaster({"csv_monitor": section(tmp_path / "file")})
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ShardwiseError, match="pip install wandb"):
        MonitorMaster({"wandb": {"enabled": True}})


# --- what an engine tells ----------------------------------------------------------------------------------
def trained(folder: Path, leads: bool = True, **config: Any) -> list[str]:
    """A loop of two micro-batches for each of three steps, that tells what an engine would."""
    model, said = nn.Linear(2, 1), []
    facts = read_ds_config({"csv_monitor": section(folder), **config})
    reports = Reports(facts, model, torch.device("cpu"), leads, said.append)
    for step in range(3):
        for _ in range(2):
            reports.forward_begins(step)
            loss = model(torch.ones(1, 2)).mean() * 0 + step
            reports.forward_ends()
            reports.loss(loss / 2)
            with reports.part("backward"):
                loss.backward()
        with reports.part("step"):
            pass
        reports.step_ends(step + 1, 4 * (step + 1), 0.1, 8.0 if "fp16" in config else None)
    reports.close()
    return said


def test_values_of_a_step_go_to_monitors(tmp_path):
    assert trained(tmp_path, fp16={"enabled": True}) == []
    assert written(tmp_path) == {
        "Train_Samples_lr.csv": "step,lr\n4,0.1\n8,0.1\n12,0.1\n",
        "Train_Samples_train_loss.csv": "step,train_loss\n4,0.0\n8,1.0\n12,2.0\n",
        "Train_Samples_loss_scale.csv": "step,loss_scale\n4,8.0\n8,8.0\n12,8.0\n",
    }


def test_times_of_its_parts(tmp_path):
    said = trained(tmp_path, wall_clock_breakdown=True, steps_per_print=2)
    (line,) = said  # of step 2
    found = re.fullmatch(
        r"step=2, time of its parts: forward ([\d.]+) ms, backward ([\d.]+) ms, step ([\d.]+) ms", line
    )
    assert found is not None and float(found[1]) > 0 and float(found[2]) > 0
    assert {"Train_Samples_elapsed_time_ms_forward.csv", "Train_Samples_elapsed_time_ms_step.csv"} <= {
        *written(tmp_path)
    }
    assert trained(tmp_path / "other", leads=False, wall_clock_breakdown=True) == []


def test_nothing_asked_for():
    assert Reports(read_ds_config({}), nn.Linear(1, 1), torch.device("cpu"), True, print).idle
