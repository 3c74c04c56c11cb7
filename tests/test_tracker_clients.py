"""Trackers that need a client: each writes offline in a process of its own, and what it wrote is read back.

Clients that are not installed are skipped. Nothing here reaches a network: clients are in their offline modes, and
proxies point at a closed port of this machine. ``python test_tracker_clients.py NAME FOLDER`` is the part of a process.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import sqlite3
import struct
import subprocess
import sys
import zipfile
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

CONFIG = {"lr": 0.1, "path": Path("x"), "none": None, "deep": {"n": 2}}
LOSSES = [(0, 1.0), (10, 0.5), (20, 0.25)]


class Kind(Enum):
    A = "a"


def train(name: str, folder: Path, **init_kwargs: Any) -> Any:
    """What every client gets: a configuration, and three steps of numbers, texts, dicts and tensors.

    Returns the client's own object.
    """
    import numpy as np
    import torch

    from shardwise import Accelerator

    acc = Accelerator(cpu=True, log_with=name, project_dir=str(folder))
    acc.init_trackers("proj", {**CONFIG, "kind": Kind.A, "dtype": torch.float32}, {name: init_kwargs})
    for step, loss in LOSSES:
        values = {"loss": torch.tensor(loss), "np": np.float32(0.5), "on": True, "group": {"a": 1, "b": np.int64(2)}}
        acc.log({**values, "note": "hello"}, step=step)
    tracker = acc.get_tracker(name)
    picture = np.zeros((8, 8, 3), np.uint8)
    if name == "aim":
        tracker.log_images({"picture": (picture, "a caption")}, step=30)
    elif hasattr(tracker, "log_images"):
        tracker.log_images({"picture": [picture]}, step=30)
    if hasattr(tracker, "log_table"):
        tracker.log_table("table", columns=["a", "b"], data=[[1, 2]], step=40)
    if name == "mlflow":
        acc.log({"unstepped": 1.0})
        (folder / "file.txt").write_text("kept")
        tracker.log_artifact(str(folder / "file.txt"), "files")
        tracker.store_init_configuration({"long": "x" * 10_000})
    own = acc.get_tracker(name, unwrap=True)
    acc.end_training()
    return own


def records(path: Path) -> list[bytes]:
    """The records of a log in LevelDB's format, as wandb and swanlab write it."""
    data, at, found, part = path.read_bytes(), 7, [], b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(part)
            part = b""
    return found


def only(paths: Any) -> Path:
    (path,) = paths
    return Path(path)


def wandb(folder: Path) -> None:
    train("wandb", folder, mode="offline", dir=str(folder))
    from wandb.proto.wandb_internal_pb2 import Record

    history, config = [], {}
    for data in records(only(folder.glob("wandb/offline-run-*/run-*.wandb"))):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
        for update in (record.run.config, record.config):
            config.update({item.key: json.loads(item.value_json) for item in update.update})
        project = record.run.project if record.HasField("run") else None
        assert project in (None, "proj")
    assert [(h["_step"], h["loss"]) for h in history[:3]] == LOSSES
    assert history[0]["np"] == 0.5 and history[0]["note"] == "hello" and history[0]["on"] is True
    assert history[0].get("group", {"a": history[0].get("group.a"), "b": history[0].get("group.b")}) == {"a": 1, "b": 2}
    assert {k: config[k] for k in ("lr", "path", "none", "deep", "kind", "dtype")} == {
        "lr": 0.1, "path": "x", "none": None, "deep": {"n": 2}, "kind": "a", "dtype": "torch.float32",
    }  # fmt: skip
    assert only(folder.glob("wandb/offline-run-*/files/media/images/picture_*.png"))
    table = only(folder.glob("wandb/offline-run-*/files/media/table/table_*.json"))
    assert json.loads(table.read_text())["data"] == [[1, 2]]


def swanlab(folder: Path) -> None:
    train("swanlab", folder, mode="offline", log_dir=str(folder / "swan"))
    import yaml
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    run = only(folder.glob("swan/run-*"))
    seen: dict[str, list[tuple[int, float]]] = {}
    texts = []
    for data in records(only(run.glob("run-*.swanlab"))):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "scalar":
            seen.setdefault(record.scalar.key, []).append((record.scalar.step, record.scalar.value.number))
        elif record.WhichOneof("record_type") == "media":
            texts.append(record.media.key)
    assert seen["loss"] == LOSSES and seen["group/b"] == [(0, 2.0), (10, 2.0), (20, 2.0)] and seen["np"][0] == (0, 0.5)
    assert sorted(texts) == ["note", "note", "note", "picture"]
    config = yaml.safe_load((run / "files" / "config.yaml").read_text())
    assert (
        config["lr"]["value"] == 0.1
        and config["deep"]["value"] == {"n": 2}
        and config["dtype"]["value"] == "torch.float32"
    )


def trackio(folder: Path) -> None:
    train("trackio", folder, auto_log_cpu=False, auto_log_gpu=False)
    data = sqlite3.connect(folder / "trackio" / "proj.db")
    rows = [
        (step, json.loads(metrics)) for step, metrics in data.execute("select step, metrics from metrics order by id")
    ]
    assert [(step, m["loss"]) for step, m in rows[:3]] == LOSSES
    assert rows[0][1] == {"loss": 1.0, "np": 0.5, "on": True, "group": {"a": 1, "b": 2}, "note": "hello"}
    assert rows[3][0] == 30 and "file_path" in rows[3][1]["picture"]
    (config,) = [json.loads(c) for (c,) in data.execute("select config from configs")]
    assert {k: v for k, v in config.items() if not k.startswith("_")} == {
        "lr": 0.1, "path": "x", "none": None, "deep": {"n": 2}, "kind": "a", "dtype": "torch.float32",
    }  # fmt: skip


def mlflow(folder: Path) -> None:
    train("mlflow", folder, logging_dir=(folder / "artifacts").as_uri(), tags={"team": "a"}, run_name="first")
    import mlflow as client

    api = client.MlflowClient()
    (run,) = api.search_runs([api.get_experiment_by_name("proj").experiment_id])
    name = run.info.run_id
    history = {k: [(m.step, m.value) for m in api.get_metric_history(name, k)] for k in run.data.metrics}
    assert history["loss"] == LOSSES and history["group/b"] == [(0, 2.0), (10, 2.0), (20, 2.0)]
    assert history["unstepped"] == [(21, 1.0)] and "note" not in history
    assert run.data.params == {
        "lr": "0.1", "path": "x", "none": "None", "deep": "{'n': 2}", "kind": "a", "dtype": "torch.float32",
    }  # fmt: skip
    assert run.info.status == "FINISHED" and run.info.run_name == "first" and run.data.tags["team"] == "a"
    assert (folder / "artifacts" / name / "artifacts" / "files" / "file.txt").read_text() == "kept"
    assert (folder / "artifacts" / name / "artifacts" / "params" / "long.txt").read_text() == "x" * 10_000


def comet_ml(folder: Path) -> None:
    import comet_ml as client

    quiet = client.ExperimentConfig(
        offline_directory=str(folder), log_code=False, log_env_details=False, log_git_metadata=False,
        auto_output_logging=False, display_summary_level=0,
    )  # fmt: skip
    train("comet_ml", folder, online=False, experiment_config=quiet)
    with zipfile.ZipFile(only(folder.glob("*.zip"))) as archive:
        sent = [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]
        about = json.loads(archive.read("experiment.json"))
    metrics = [m["payload"]["metric"] for m in sent if m["type"] == "metric_msg"]
    by_name = {
        k: [(m["step"], m["metricValue"]) for m in metrics if m["metricName"] == k] for k in ("loss", "group/b", "on")
    }
    assert by_name == {"loss": LOSSES, "group/b": [(0, 2), (10, 2), (20, 2)], "on": [(0, 1), (10, 1), (20, 1)]}
    assert any(m["type"] == "log_other" and m["payload"]["key"] == "note" for m in sent)
    params = {p["paramName"]: p["paramValue"] for m in sent for p in [m["payload"].get("param")] if p}
    assert (
        params["lr"] == 0.1 and params["path"] == "x" and params["dtype"] == "torch.float32" and params["deep|n"] == 2
    )
    assert about["project_name"] == "proj"


def clearml(folder: Path) -> None:
    from clearml import Task

    Task.set_offline(True)
    Task.force_store_standalone_script()  # else it studies the repository and all packages
    (folder / "requirements.txt").write_text("")
    Task.force_requirements_env_freeze(requirements_file=str(folder / "requirements.txt"))
    train("clearml", folder, auto_connect_frameworks=False, auto_resource_monitoring=False,
          auto_connect_arg_parser=False, auto_connect_streams=False)  # fmt: skip
    session = only(p for p in (folder / "clearml" / "offline").iterdir() if p.is_dir())
    events = [e for line in (session / "metrics.jsonl").read_text().splitlines() for e in json.loads(line)]
    scalars = [e for e in events if e["type"] == "training_stats_scalar"]
    loss = [(e["iter"], e["value"]) for e in scalars if (e["metric"], e["variant"]) == ("loss", "train")]
    assert loss == LOSSES and any(e["metric"] == "group/b" for e in scalars)
    assert any(e["type"] == "training_debug_image" and e["metric"] == "picture" for e in events)
    assert any(e["type"] == "plot" and e["metric"] == "table" for e in events)
    task = json.loads((session / "task.json").read_text())
    config = task["configuration"]["General"]["value"] if "configuration" in task else json.dumps(task)
    assert "torch.float32" in config and task["name"] == "proj"


def aim(folder: Path) -> None:
    own = train("aim", folder, system_tracking_interval=None, capture_terminal_logs=False)
    from aim import Repo, Run
    from aim.sdk.index_manager import RepoIndexManager
    from aim.storage.context import Context

    RepoIndexManager.get_index_manager(Repo.from_path(str(folder))).index(own.hash)  # its server does it otherwise
    run = Run(own.hash, repo=str(folder), read_only=True)
    assert run.name == "proj"
    assert run["hparams"] == {
        "lr": 0.1, "path": "x", "none": None, "deep": {"n": 2}, "kind": "a", "dtype": "torch.float32",
    }  # fmt: skip
    found = {m.name: m.data.items_list() for m in run.metrics()}
    found = {k: list(zip(steps, columns[0], strict=True)) for k, (steps, columns) in found.items()}
    assert found["loss"] == LOSSES and found["group/b"] == [(0, 2), (10, 2), (20, 2)]
    texts = run.get_text_sequence("note", context=Context({}))
    assert [t.data for t in texts.values.values_list()] == ["hello"] * 3
    pictures = run.get_image_sequence("picture", context=Context({}))
    assert [i.caption for i in pictures.values.values_list()] == ["a caption"]


def dvclive(folder: Path) -> None:
    train("dvclive", folder, dir=str(folder / "live"), save_dvc_exp=False, dvcyaml=False)
    live = folder / "live"
    with (live / "plots" / "metrics" / "loss.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [(int(r["step"]), float(r["loss"])) for r in rows] == LOSSES
    latest = json.loads((live / "metrics.json").read_text())
    assert latest["note"] == "hello" and latest["group"] == {"a": 1, "b": 2} and latest["on"] is True
    text = (live / "params.yaml").read_text()
    assert "lr: 0.1" in text and "dtype: torch.float32" in text


CLIENTS = {f.__name__: f for f in (wandb, swanlab, trackio, mlflow, comet_ml, clearml, aim, dvclive)}


@pytest.mark.parametrize("name", sorted(CLIENTS))
def test_what_was_logged_offline_can_be_read_back(name, tmp_path):
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"{name} is not installed")
    nowhere = "http://127.0.0.1:9"
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HOME": str(tmp_path / "home"),
        "http_proxy": nowhere, "https_proxy": nowhere, "HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere,
        "WANDB_MODE": "offline", "WANDB_SILENT": "true",
        "HF_HUB_OFFLINE": "1", "TRACKIO_DIR": str(tmp_path / "trackio"),
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db", "MLFLOW_DISABLE_TELEMETRY": "true",
        "CLEARML_CACHE_DIR": str(tmp_path / "clearml"), "DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1",
    }  # fmt: skip
    (tmp_path / "home").mkdir()
    done = subprocess.run(
        [sys.executable, __file__, name, str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=170,
    )  # fmt: skip
    assert done.returncode == 0 and "all of it is there\n" in done.stdout, done.stdout + done.stderr


if __name__ == "__main__":
    CLIENTS[sys.argv[1]](Path(sys.argv[2]))
    print("all of it is there")
