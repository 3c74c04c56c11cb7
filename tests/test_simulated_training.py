"""On the simulated device: wherever the states are, the numbers are those of a run that keeps them on the device.

``ranks.run(..., device="sim")`` also fails each of these where two operations race. Bit for bit in fp32; in lower
precision, what is said to be equal is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import shardwise
from models import PRESETS, adamw, assert_close, assert_same, batch, loss_of, make, rank, train_alone, whole, world
from ranks import run
from slowly import slow_unless

pytestmark = [pytest.mark.usefixtures("simulated_device"), pytest.mark.timeout(600)]
SIM = "sim:0"

CPU = {"offload_params": "cpu", "offload_grads": "cpu", "offload_optimizer": "cpu"}
NVME = {"offload_params": "nvme", "offload_grads": "cpu", "offload_optimizer": "nvme"}
HOMES: dict[str, dict[str, Any]] = {
    "device": {},
    "optimizer-cpu": {"offload_optimizer": "cpu"},
    "optimizer-half-cpu": {"offload_optimizer": "cpu", "offload_ratio": 0.5},
    "optimizer-nvme": {"offload_optimizer": "nvme"},
    "optimizer-half-nvme": {"offload_optimizer": "nvme", "offload_ratio": 0.5},
    "params-cpu": {"offload_params": "cpu"},
    "params-nvme": {"offload_params": "nvme"},
    "grads-cpu": {"offload_grads": "cpu"},
    "params-optimizer-cpu": {"offload_params": "cpu", "offload_optimizer": "cpu"},
    "grads-optimizer-half-cpu": {"offload_grads": "cpu", "offload_optimizer": "cpu", "offload_ratio": 0.5},
    "all-cpu": CPU,
    "all-cpu-at-once": CPU | {"offload_overlap": False},
    "all-cpu-unpinned": CPU | {"pin_memory": False},
    "all-nvme": NVME,
    "activations": {"activation_offload": "cpu"},
    "activations-checkpointed": {"activation_offload": "cpu", "activation_checkpointing": True},
}
BELOW = ["optimizer-cpu", "grads-cpu", "all-cpu", "all-nvme", "activations-checkpointed"]
"""What several ranks try without being asked; the others with ``-m slow``."""

Result = tuple[list[float], list[float], dict[str, torch.Tensor]]


def train(
    strategy: shardwise.Strategy | None, *, set_to_none: bool = True, evaluate: bool = False, clip: float | None = 0.5,
    steps: int = 4, device: str = SIM,
) -> Result:  # fmt: skip
    """Losses, norms and whole weights of a script that never waits for the device in between."""
    model = make().to(device)
    if strategy is not None:
        shardwise.fully_shard(model, strategy=strategy)
    optimizer = adamw(model.parameters())
    losses, norms = [], []
    for step in range(steps):
        ids = batch(step, rank()).to(device, non_blocking=True)
        loss = loss_of(model, ids)
        loss.backward()
        losses.append(loss.detach())
        if clip is not None:
            clipping = torch.nn.utils.clip_grad_norm_ if strategy is None else shardwise.clip_grad_norm_
            norms.append(clipping(model.parameters(), clip))
        if evaluate:
            with torch.no_grad():
                losses.append(loss_of(model, ids))
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
    state = {name: value.detach().cpu() for name, value in whole(model).items()}
    return [float(x) for x in losses], [float(x) for x in norms], state


def assert_equal(result: Result, expected: Result) -> None:
    assert result[0] == expected[0]
    assert result[1] == expected[1]
    assert_same(result[2], expected[2])


@cache
def kept_on_the_device(evaluate: bool, shard_size: int | None = None) -> Result:
    """What the others are compared with; itself with plain torch, and with one process on the rows of all ranks.

    Args:
        shard_size: of groups, in which sums are taken in two stages; the device's backend has no order for all ranks.
    """
    preset = "ddp" if shard_size is None else "hsdp"
    result = train(shardwise.Strategy(preset, shard_size=shard_size), evaluate=evaluate)
    if world() == 1:
        assert_equal(result, train(None, evaluate=evaluate))
    else:
        _, norms, weights = train_alone(world())
        torch.testing.assert_close(torch.tensor(result[1]), torch.tensor(norms), rtol=1e-4, atol=1e-4)
        assert_close(result[2], weights, 1e-4)
    return result


def is_as_on_the_device(preset: str, home: str, nvme: str, evaluate: bool, set_to_none: bool) -> None:
    keys = HOMES[home] | ({"nvme_path": nvme} if "nvme" in home else {})
    shard_size = world() // 2 if preset == "hsdp" else None
    strategy = shardwise.Strategy(preset, shard_size=shard_size, **keys)
    result = train(strategy, evaluate=evaluate, set_to_none=set_to_none)
    assert_equal(result, kept_on_the_device(evaluate, shard_size))


# Of each home: "ddp" with every second of these, and "zero3" with the others.
HOW = [(True, False), (False, True), (True, True), (False, False)]


@pytest.mark.parametrize(
    ("preset", "home", "set_to_none", "evaluate"),
    [
        slow_unless(preset in ("ddp", "zero3") and (h + k + (preset == "zero3")) % 2 == 0, preset, home, *how)
        for preset in PRESETS
        for h, home in enumerate(HOMES)
        for k, how in enumerate(HOW)
    ],
)
def test_every_home_on_one_rank(preset, home, set_to_none, evaluate, tmp_path):
    run(1, is_as_on_the_device, preset, home, str(tmp_path), evaluate, set_to_none, device="sim")


@pytest.mark.parametrize(
    ("size", "preset", "home"),
    [slow_unless(h in BELOW, 2, p, h) for p in PRESETS for h in HOMES]
    + [slow_unless(h in ("all-cpu", "device"), 4, p, h) for p in ("zero2", "zero3", "hsdp") for h in HOMES],
)
def test_every_home_on_several_ranks(size, preset, home, tmp_path):
    run(size, is_as_on_the_device, preset, home, str(tmp_path), True, size == 2, device="sim")
