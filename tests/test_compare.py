"""``shardwise compare``: a script that fails under one strategy, under several."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from shardwise.cli import app
from test_launch import command

SCRIPT = """
import os, sys, torch, shardwise
from torch import nn

accelerator = shardwise.Accelerator()
if os.environ["SHARDWISE_STRATEGY"] == sys.argv[1]:
    raise ValueError("not under this one")
model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])
model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
step = 0
while True:  # the command ends it
    accelerator.backward(model(torch.randn(4, 64)).square().mean())
    optimizer.step()
    optimizer.zero_grad()
    step += 1
    assert step <= 4
"""
MODEL = """
import torch
from torch import nn

def planned(batch=4):
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]), torch.zeros(batch, 64), lambda m, x: m(x).sum()
"""
ROUNDED = 0.05


def invoke(*args):
    return CliRunner().invoke(app, ["compare", *map(str, args)])


def compared(folder, *args):
    """The whole command, whose launchers and ranks are forked."""
    return command("compare", *args, cwd=folder)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_measured_stands_beside_predicted_and_a_failure_is_a_row(tmp_path, script):
    page, folder, model = tmp_path / "page.html", tmp_path / "runs", tmp_path / "model.py"
    model.write_text(MODEL)
    code, out, err = compared(
        tmp_path, "--strategies", "zero2,zero3", "--steps", 4, "-n", 2, "--cpu", "--json", "--html", page,
        "--folder", folder, "--model", f"{model}:planned", "--batch", 4, script, "zero2",
    )  # fmt: skip
    assert code == 0, out + err
    failed, row = json.loads(out)
    assert failed["strategy"] == "zero2" and "ValueError: not under this one" in failed["failure"]
    assert row["strategy"] == "zero3" and not row["failure"] and row["step_s"] > 0
    assert row["unit"] == "rows/s" and row["rate"] == pytest.approx(8 / row["step_s"])
    assert row["sent"] == pytest.approx(row["predicted"]["sent"], rel=ROUNDED) and row["sent"] > 3 * 64 * 64 * 4
    assert row["states"] > 0 and row["predicted"]["states"] and row["peak"] > 1 << 20
    assert 0 < row["predicted"]["step_s"] < 10 and row["predicted"]["peak"] is None  # a CPU's is not a process's
    assert "zero3" in page.read_text() and (folder / "01-zero3" / "output.txt").exists()


def test_all_failed_is_exit_code_1(tmp_path, script):
    code, out, _ = compared(tmp_path, "--strategies", "ddp", "--steps", 3, "--cpu", "-n", 1, script, "ddp")
    assert code == 1 and "not under this one" in out


def test_a_run_that_does_not_end_is_a_row(tmp_path):
    path = tmp_path / "slow.py"
    path.write_text("import time\ntime.sleep(600)\n")
    code, out, _ = compared(tmp_path, "--strategies", "ddp", "--cpu", "-n", 1, "--timeout", 3, path)
    assert code == 1 and "not over after 3 s" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--strategies", "zero4"], "zero4"),
        (["--strategies", "ddp,ddp"], "twice"),
        (["--strategies", ","], "none"),
        (["--steps", "2"], "--steps 2"),
        (["--timeout", "0"], "--timeout 0"),
        (["--batch", "4"], "--model"),
        (["--model", "lama-8b"], "llama-8b"),
    ],
)
def test_wrong_requests_are_one_error(script, options, said):
    done = invoke(*options, script, "none")
    assert said in str(done.exception)


def test_a_script_that_is_not_there_is_one_error():
    assert "there is no script" in str(invoke("nowhere.py").exception)
