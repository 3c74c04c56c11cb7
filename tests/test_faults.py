"""A rank that fails, dies or goes another way ends every rank in time, with one readable report."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = """
import os, signal, sys, time
import torch
import shardwise
from models import Block, adamw, batch, loss_of, make

what, strategy, culprit = sys.argv[1], sys.argv[2], int(sys.argv[3])
rank = int(os.environ["RANK"])
torch.set_num_threads(1)
shardwise.init("cpu")
model = shardwise.fully_shard(make(), strategy=strategy + ",timeout=5", units=Block)
opt = adamw(model.parameters())

class Boom(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): raise ValueError("boom in backward")

def trip(module, args, out):
    if step == 2 and rank == culprit:
        if what == "forward": raise ValueError("boom in forward")
        if what == "backward": return Boom.apply(out)
        if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if what == "hang": time.sleep(14)
model.blocks[1].down.register_forward_hook(trip)
forward = type(model).forward
def divergent(ids):
    if step == 2 and what == "diverge":
        x = model.embed(ids)
        x = model.blocks[1](x) if rank == culprit else model.blocks[2](x)
        return model.head(model.norm(x))
    return forward(model, ids)
model.forward = divergent
for step in range(4):
    loss_of(model, batch(step, rank)).backward()
    opt.step()
    opt.zero_grad()
    print("step", step, flush=True)
"""


def start(tmp_path: Path, size: int, *args: str) -> tuple[list[int], list[str], float]:
    """Run the script on ``size`` ranks; returns exit codes, error outputs and seconds."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    begin = time.monotonic()
    ranks = []
    for r in range(size):
        env = {
            **os.environ, "RANK": str(r), "WORLD_SIZE": str(size), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }  # fmt: skip
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(path), *args], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    outputs = [p.communicate(timeout=100)[1] for p in ranks]
    return [p.returncode for p in ranks], outputs, time.monotonic() - begin


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
@pytest.mark.parametrize(("what", "culprit"), [("forward", 1), ("backward", 0), ("backward", 1)])
def test_exception_on_one_rank(what, culprit, strategy, tmp_path):
    codes, errors, seconds = start(tmp_path, 2, what, strategy, str(culprit))
    assert all(c not in (0, None) for c in codes)
    assert seconds < 45
    assert f"boom in {what}" in errors[culprit], "the rank's own traceback"
    report = errors[1 - culprit]
    if culprit == 1:  # rank 0 hosts the store; when it goes, its words may go with it
        assert f"rank 1 failed in {what} of unit 'blocks." in report and f"boom in {what}" in report
        assert re.search(r"rank 0 was waiting for (gather|reduce|control) of", report)
    else:
        assert "shardwise report" in report and "was waiting for" in report
    assert "Traceback" not in report, "only the culprit shows a traceback"


@pytest.mark.parametrize("strategy", [pytest.param("zero1", marks=pytest.mark.slow), "zero3"])
def test_killed_rank(strategy, tmp_path):
    codes, errors, seconds = start(tmp_path, 3, "kill", strategy, "2")
    assert codes[2] == -9 and codes[0] == codes[1] == 1 and seconds < 45
    reports = [e for e in errors[:2] if "shardwise report" in e]
    assert len(reports) == 1, "one rank speaks for all"
    assert "ended or lost its connection" in reports[0] and "was waiting for" in reports[0]


def test_ranks_in_different_branches_under_zero3(tmp_path):
    codes, errors, seconds = start(tmp_path, 2, "diverge", "zero3", "1")
    assert codes == [1, 1] and seconds < 60
    report = next(e for e in errors if "shardwise report" in e)
    assert "did not complete within its timeout" in report or "lost its connection" in report
    assert "unit 'blocks.1'" in report and "unit 'blocks.2'" in report, "names both sides"


def test_a_hanging_rank_is_reported_within_the_timeout(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    codes, errors, _ = start(tmp_path, 2, "hang", "zero3", "1")
    assert codes[0] == 1
    report = errors[0]
    assert "did not complete within its timeout" in report and "rank 1: not waiting in a collective" in report
