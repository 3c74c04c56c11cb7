"""The same script on every device there is, through the launcher; which device a rank gets, and what is refused."""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path

import pytest
import torch

import processes
import shardwise
from models import PRESETS
from shardwise import device

SCRIPT = """
import sys

import torch
import shardwise
from models import adamw, assert_close, batch, loss_of, make, whole

world = shardwise.init()
accelerator = shardwise.Accelerator(gradient_accumulation_steps=2)
assert accelerator.gradient_accumulation_steps == 5, "the launcher's"
for strategy in sys.argv[1:]:
    model, oracle = make().to(world.device), make().to(world.device)
    shardwise.fully_shard(model, strategy=shardwise.Strategy.parse(strategy))
    opts = [adamw(m.parameters()) for m in (model, oracle)]
    for step in range(4):
        ids = [batch(step, r).to(world.device) for r in range(world.size)]
        loss_of(model, ids[world.rank]).backward()
        loss_of(oracle, torch.cat(ids)).backward()
        shardwise.clip_grad_norm_(model, 0.5)
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)
        for o in opts:
            o.step()
            o.zero_grad()
    assert_close(whole(model), whole(oracle), 1e-3 if "bf16" not in strategy else 0.2)
    assert next(iter(whole(model).values())).device == world.device
    sys.stdout.write(f"{strategy} on {world.device} over {world.size}\\n")  # in one piece, beside the other ranks'
"""


@pytest.mark.parametrize("on", ["cpu", pytest.param("accelerator", marks=pytest.mark.gpu)])
def test_training(on: str, tmp_path: Path) -> None:
    """One launch for all strategies, and for the launcher's word to the Accelerator: the start costs most.

    On the CPU what follows is trained everywhere in these tests, so three strategies will do.
    """
    kind = "cpu" if on == "cpu" else device.accelerator()
    if kind is None:
        pytest.skip("no accelerator")
    ranks = 2 if on == "cpu" else device.count()
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    strategies = [*PRESETS, *(f"{preset},param_dtype=bf16" for preset in PRESETS)]
    if on == "cpu":
        strategies = ["ddp", "zero3", "zero2,param_dtype=bf16"]
    launch = ["-m", "shardwise", "launch", "--nproc", ranks, "--gradient-accumulation-steps", 5]
    launch += ["--cpu"] if on == "cpu" else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    code, out, err = processes.program(*launch, script, *strategies, environment=environment).finish(150)
    assert code == 0, err[-2000:]
    for strategy in strategies:
        assert out.count(f"{strategy} on {kind}") == ranks, strategy
    assert out.count(f"over {ranks}") == ranks * len(strategies)


# --- which device ---------------------------------------------------------------------------------
@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with two accelerators, of a type that torch knows and need not have."""
    monkeypatch.setattr(device, "accelerator", lambda: "xpu")
    monkeypatch.setattr(device, "count", lambda: 2)


@pytest.mark.usefixtures("two")
def test_a_name_or_a_number_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device.of_rank() == device.named("xpu") == torch.device("xpu", 1)
    assert device.named("xpu:0") == device.named(0) == device.named(torch.device("xpu", 0)) == torch.device("xpu", 0)
    assert device.named("cpu:0") == device.named("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("two")
def test_the_cpu_is_never_taken_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    for wanted, message in (("xpu:2", "xpu:2 was asked for"), ("cuda", "has none"), ("nonsense", "not a device")):
        with pytest.raises(shardwise.ShardwiseError, match=message) as caught:
            shardwise.init(wanted)
        assert "xpu:0, xpu:1" in str(caught.value)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for init in (shardwise.init, lambda: shardwise.init("xpu")):
        with pytest.raises(shardwise.ShardwiseError, match="3 ranks and 2 xpu devices"):
            init()


def test_backends() -> None:
    assert device.backend(torch.device("cuda", 0), 2) == "cpu:gloo,cuda:nccl"
    assert device.backend(torch.device("cpu"), 2) == "gloo"
    assert device.backend(torch.device("mps"), 1) == "gloo"
    with pytest.raises(shardwise.ShardwiseError, match="no backend for several ranks on mps"):
        device.backend(torch.device("mps"), 2)


def test_the_seam_is_the_only_place_that_knows() -> None:
    """Streams, memory, generators and backends of one vendor are named in ``device.py`` alone."""
    root = Path(shardwise.__file__).parent
    telling = re.compile(r"torch\.(cuda|xpu|mps|mtia|hpu|npu)\b|\.type\s*(==|!=)\s*[\"'](cuda|xpu|mps)|\.is_cuda\b")
    names = {"torch.cuda"}  # of a type in a pickle, which is data
    for path in root.rglob("*.py"):
        if path.name != "device.py" and telling.search(text := path.read_text()):
            code = ast.unparse(ast.parse(text))  # without comments
            found = {m.group() for m in telling.finditer(code)}
            assert found <= (names if path.name == "torch_format.py" else set()), path
