"""DeepSpeed's monitors on this library's trackers."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ranks import run
from shardwise.deepspeed.monitor import MonitorMaster, get_monitor_config
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
