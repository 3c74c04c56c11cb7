"""DeepSpeed's configuration and launcher arguments on the command line."""

from __future__ import annotations

import json
import shlex
import socket
from pathlib import Path
from typing import Any

import pytest

from shardwise import Accelerator, DeepSpeedPlugin
from shardwise.cli.hostfile import chosen, read_hostfile
from shardwise.errors import ConfigError, LaunchError
from test_launch import ECHO, command, refused, said, script


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def configuration(**config: Any) -> str:
    Path("ds.json").write_text(json.dumps(config))
    return "ds.json"


SAYS = ECHO.replace('"OMP_NUM_THREADS"', '"SHARDWISE_DEEPSPEED_CONFIG"')


def test_launch_passes_a_configuration_on(tmp_path: Path) -> None:
    file = configuration(zero_optimization={"stage": 2}, optimizer={"type": "Adam"})
    Path("settings.yaml").write_text("strategy: zero3\nnproc: 2\n")
    code, _, err = command(
        "launch", "--config", "settings.yaml", "--cpu", "--deepspeed_config", file, script(tmp_path, SAYS), cwd=tmp_path
    )
    assert code == 0, err
    (variables, _), _ = said(tmp_path)
    assert (
        variables["SHARDWISE_DEEPSPEED_CONFIG"] == str(tmp_path / "ds.json") and variables["SHARDWISE_STRATEGY"] is None
    )


def test_an_accelerator_reads_the_launchers_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    file = configuration(
        zero_optimization={"stage": 2}, gradient_accumulation_steps=3, gradient_clipping=0.5, bf16={"enabled": True}
    )
    monkeypatch.setenv("SHARDWISE_DEEPSPEED_CONFIG", file)
    for given in ({}, {"strategy": "zero3"}, {"deepspeed_plugin": DeepSpeedPlugin(zero_stage=1)}):
        accelerator = Accelerator(cpu=True, **given)
        assert str(accelerator.strategy) == "zero2,param_dtype=bf16,autocast=true"
        assert accelerator.gradient_accumulation_steps == 3
    configuration(optimizer={"type": "Adam"})
    with pytest.raises(ConfigError, match="optimizer is not served"):
        Accelerator(cpu=True)


def test_launch_refuses_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = script(tmp_path, "")
    file = configuration(zero_optimisation={})
    assert "did you mean 'zero_optimization'" in refused(monkeypatch, capsys, "launch", "--deepspeed-config", file, job)
    err = refused(monkeypatch, capsys, "launch", "--strategy", "ddp", "--deepspeed-config", file, job)
    assert "contradict" in err
    assert "shardwise deepspeed" in refused(monkeypatch, capsys, "launch", "--hostfile", "x", job)


def test_one_host_is_started(tmp_path: Path) -> None:
    own = ["--deepspeed", "--deepspeed_config", "ds.json"]
    code, _, err = command("deepspeed", "--num_gpus", 2, "--cpu", script(tmp_path, SAYS), *own, cwd=tmp_path)
    assert code == 0, err
    assert [(e["RANK"], e["WORLD_SIZE"], args) for e, args in said(tmp_path)] == [("0", "2", own), ("1", "2", own)]


def test_of_several_hosts_this_one_is_started(tmp_path: Path) -> None:
    Path("hosts").write_text("one slots=1 # this\n\n# and that\ntwo slots=1\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = script(tmp_path, "import os; print('rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'])")
    from test_launch import start

    meet = ["--hostfile", "hosts", "--cpu", "--master_addr", "127.0.0.1", "--master_port", port, "--node_rank"]
    both = [start("deepspeed", *meet, rank, job, cwd=tmp_path) for rank in (0, 1)]
    found = [one.finish() for one in both]
    assert [code for code, *_ in found] == [0, 0], found
    assert ["rank 0 of 2" in found[0][1], "rank 1 of 2" in found[1][1]] == [True, True]


def test_several_hosts_get_a_command_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("hosts").write_text("worker-0 slots=4\nworker-1 slots=4\nworker-2 slots=2\n")
    job = script(tmp_path, "")
    err = refused(
        monkeypatch, capsys, "deepspeed", "--hostfile", "hosts", "--exclude", "worker-2@worker-0:0@worker-1:3",
        "--master_port", "1234", "--cpu", job, "--lr", "a b",
    )  # fmt: skip
    first, second = (shlex.split(line.partition(": ")[2]) for line in err.splitlines()[1:])
    meet = ["--cpu", "--nnodes", "2", "--rdzv-endpoint", "worker-0:1234", "--node-rank"]
    assert first == ["shardwise", "launch", "--nproc", "3", *meet, "0", job, "--lr", "a b"]
    assert second == ["shardwise", "launch", "--nproc", "3", *meet, "1", job, "--lr", "a b"]
    err = refused(
        monkeypatch, capsys, "deepspeed", "--hostfile", "hosts", "--include", "worker-0:1,2@worker-1:0,3", job
    )
    assert "--devices 1,2" in err and "--devices 0,3" in err
    assert "as many on each" in refused(monkeypatch, capsys, "deepspeed", "--hostfile", "hosts", job)
    err = refused(monkeypatch, capsys, "deepspeed", "--hostfile", "hosts", "--num_nodes", "2", "--num_gpus", "1", job)
    assert err.count("--nproc 1") == 2 and "worker-2" not in err
    err = refused(monkeypatch, capsys, "deepspeed", "--hostfile", "hosts", "--include", "worker-1", job)
    assert "is not this one" in err and "shardwise launch --nproc 4" in err


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--num_gpus", "0"], "chooses nothing"),
        (["--num_gpus", "1", "--include", "localhost:0"], "one way to choose"),
        (["--include", "localhost:0", "--exclude", "localhost:1"], "contradict"),
        (["--include", "locahost:0", "--cpu"], "did you mean 'localhost'"),
        (["--exclude", "localhost:0", "--cpu"], "leaves no device"),
        (["--num_nodes", "2"], "there are 1"),
        (["--hostfile", "nowhere"], "nowhere: the file of hosts cannot be read"),
        (["--autotuning", "run"], "shardwise plan"),
        (["--launcher", "pdsh"], "run the command of each host on it"),
        (["--enable_each_rank_log", "x"], "--record"),
    ],
)
def test_what_is_wrong_says_so(
    flags: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in refused(monkeypatch, capsys, "deepspeed", *flags, script(tmp_path, ""))


@pytest.mark.parametrize(
    ("text", "message"),
    [("a slots=2\na slots=2", "there twice"), ("a slot=2", "line 1"), ("a slots=0", "line 1"), ("# a\n", "no host")],
)
def test_hostfiles(text: str, message: str, tmp_path: Path) -> None:
    Path("hosts").write_text(text)
    with pytest.raises(LaunchError, match=message):
        read_hostfile(Path("hosts"))


def test_include_and_exclude_as_deepspeed_does(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = {"a": [0, 1, 2], "b": [0, 1]}
    cases = [("a", ""), ("b:1@a:2,0", ""), ("a:0@a:1", ""), ("", "a"), ("", "a:0@b:1"), ("", "")]
    found = [chosen(hosts, *case) for case in cases]
    assert found == [
        {"a": [0, 1, 2]}, {"a": [0, 2], "b": [1]}, {"a": [0, 1]}, {"b": [0, 1]}, {"a": [1, 2], "b": [0]}, hosts,
    ]  # fmt: skip
    for case in (("c", ""), ("a:3", ""), ("", "a@b")):
        with pytest.raises(LaunchError):
            chosen(hosts, *case)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    from deepspeed.launcher.runner import parse_resource_filter

    assert [dict(parse_resource_filter({k: list(v) for k, v in hosts.items()}, *case)) for case in cases] == found
