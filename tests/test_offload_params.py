"""Parameters at home on the CPU or on a disk: the same bits, brought unit by unit ahead of use, in bounded memory."""

from __future__ import annotations

import copy
import gc
import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardwise
from models import PRESETS, adamw, assert_same, batch, loss_of, make, rank, train, whole
from ranks import run
from shardwise.tiers.home import Home
from slowly import in_turn
from test_offload import (
    at,
    doors,
    every,
    homes_for,
    pairs,
    pairs_in_turn,
    saved_and_resumed,
    separate_memory,
    stories,
    values_by_hand,
)  # fmt: skip

HOMES = ("device", "cpu", "nvme")
MIXED = [f"offload_params={p},offload_optimizer={o}" for p, o in product(("cpu", "nvme"), HOMES)]
FEW = ["offload_params=cpu", "offload_params=nvme,offload_optimizer=nvme"]
BOTH = FEW[1]
SIZES = {"d": 64, "vocab": 97, "odd": False}


def clean(path: Path) -> None:
    gc.collect()
    assert os.listdir(path) == []


# --- the same bits ---------------------------------------------------------------------------------
ON = {1: ["ddp", "zero3"], 3: ["zero1", "zero3"], 4: ["zero2", "hsdp,shard_size=2"]}


@pytest.mark.parametrize("world", [1, 3, 4])
def test_same_bits_on_any_number_of_ranks(world, tmp_path):
    run(world, pairs, ON[world], str(tmp_path), {"steps": 3, "clip": 0.5 if world > 1 else None}, FEW)
    clean(tmp_path)


@every
def test_same_bits_under_every_preset(every, tmp_path):
    run(2, pairs_in_turn, PRESETS, str(tmp_path), {"steps": 3, "clip": 0.5}, every, MIXED)
    clean(tmp_path)


@every
def test_same_bits_with_master_values_apart(every, tmp_path):
    strategies = [s + ",param_dtype=bf16" for s in ("ddp", "zero2", "zero3", "zero1,layout=tensor")]
    run(2, pairs_in_turn, strategies, str(tmp_path), {"steps": 3}, every, MIXED)
    run(2, pairs, ["zero3,param_dtype=fp16"], str(tmp_path), {"steps": 3}, FEW)


@pytest.mark.parametrize("depth", [0, 3])
def test_any_prefetch_depth(depth, tmp_path):
    extra = f",offload_prefetch={depth},offload_buffers=2"
    run(2, pairs, ["zero3" + extra, "zero2,param_dtype=bf16" + extra], str(tmp_path), {"steps": 3}, FEW)


def test_tied_heads(tmp_path):
    strategies = ["zero1", "zero3", "zero3,param_dtype=bf16"]
    run(2, pairs, strategies, str(tmp_path), {"steps": 3, "tied": True}, [*FEW, "offload_params=nvme"])


def test_frozen_added_scheduled_accumulated(tmp_path):
    run(2, stories, str(tmp_path), ["ddp", "zero3", "hsdp,shard_size=1", "zero2,param_dtype=bf16"], FEW)


class Twice(nn.Module):
    """A unit used twice in a row, one used again later, one that comes and goes."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(24, 24) for _ in range(4))

    def forward(self, x: torch.Tensor, skip: bool) -> torch.Tensor:
        a, b, c, d = self.blocks
        x = F.gelu(a(F.gelu(a(x))))
        x = x if skip else F.gelu(b(x))
        return d(F.gelu(a(c(x))))


def twice(strategy: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = shardwise.fully_shard(Twice(), strategy=strategy)
    opt = adamw(model.parameters())
    losses = []
    for step in range(5):
        torch.manual_seed(10 * step + rank())
        loss = model(torch.randn(3, 24), skip=step in (1, 2)).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            losses.append(model(torch.ones(2, 24), skip=True).sum().item())
    return losses, whole(model)


def used_twice(path: str) -> None:
    for strategy in ("ddp", "zero3", "zero3,param_dtype=bf16"):
        plain = twice(strategy)
        for home, depth in product(MIXED[1::2], (0, 2)):
            losses, weights = twice(at(f"{strategy},offload_prefetch={depth}", home, path))
            assert losses == plain[0]
            assert_same(weights, plain[1])


def test_units_used_twice_in_a_row(tmp_path):
    run(2, used_twice, str(tmp_path))


def over_the_link(path: str, every: bool) -> None:
    for index, strategy in enumerate(("ddp", "zero2", "zero3", "zero3,layout=tensor")):
        plain = train(strategy, steps=3)
        with separate_memory():
            for home in homes_for(index, MIXED, every):
                losses, norms, weights = train(at(strategy, home, path), steps=3)
                assert (losses, norms) == plain[:2], (strategy, home)
                assert_same(weights, plain[2])
    with separate_memory():
        stories(path, ["zero3"], [BOTH])
        values_by_hand(path, "", [BOTH])


@every
def test_same_bits_when_values_are_copied_to_the_device(every, tmp_path):
    run(2, over_the_link, str(tmp_path), every)


# --- without gradients ------------------------------------------------------------------------------
def streamed(path: str, home: str, separate: bool) -> Any:
    """Evaluation: every unit's values are read once per forward, before they are waited for."""
    plain = shardwise.fully_shard(make(**SIZES, layers=6), strategy="zero3")
    if separate:
        with separate_memory():
            model = shardwise.fully_shard(make(**SIZES, layers=6), strategy=at("zero3", home, path))
    else:
        model = shardwise.fully_shard(make(**SIZES, layers=6), strategy=at("zero3", home, path))
    ids = batch(0, rank())[:, :-1]
    with torch.inference_mode():
        for _ in range(3):  # the first forward learns the order
            shardwise.reset_stats(model)
            got = model(ids)
        assert torch.equal(got, plain(ids))
    stats = shardwise.stats(model)
    numel = sum(p.numel() for p in model.parameters())
    return stats, numel * 4 // 2


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("home", ["offload_params=cpu", "offload_params=nvme"])
def test_evaluation_streams_units_ahead(home, separate, tmp_path):
    for stats, mine in run(2, streamed, str(tmp_path), home, separate):
        disk = home.endswith("nvme")
        assert (mine if disk else 0) <= stats.disk.bytes_read <= (1.02 * mine if disk else 0)
        assert stats.disk.bytes_written == 0
        assert (mine if separate else 0) <= stats.to_device <= (1.02 * mine if separate else 0)
        assert stats.live["gather_buffers"] == 0, "nothing is left behind"


def read_ahead(path: str) -> list[int]:
    """How many reads are under way when a unit begins to compute."""
    model = shardwise.fully_shard(
        make(**SIZES, layers=6), strategy=at("zero3,offload_prefetch=2", "offload_params=nvme", path)
    )
    staged: list[int] = []
    engine = shardwise.engine.build.require_engine(model)
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: staged.append(sum(u.residence.staging for u in engine.units)))
    ids = batch(0, rank())[:, :-1]
    for _ in range(2):
        staged.clear()
        with torch.no_grad():
            model(ids)
    return staged


def test_as_many_units_are_staged_as_asked_for(tmp_path):
    for staged in run(2, read_ahead, str(tmp_path)):
        assert max(staged) == 2 and staged[0] == 2 and staged[-1] == 0


# --- memory and traffic -------------------------------------------------------------------------------
def footprint(path: str, home: str, layers: int) -> Any:
    strategy = at("zero3,optimizer_in_backward=true", home, path)
    model = shardwise.fully_shard(make(layers=layers, **SIZES), strategy=strategy)
    opt = adamw(model.parameters())
    shardwise.attach(opt)
    for step in range(4):
        if step == 2:
            shardwise.reset_stats(model)
        loss_of(model, batch(step, rank())).backward()
        opt.step()
        opt.zero_grad()
    return shardwise.stats(model), sum(p.numel() for p in model.parameters())


def test_what_is_live_does_not_depend_on_the_depth_of_the_model(tmp_path):
    peaks = []
    for layers in (4, 16):
        stats, numel = run(2, footprint, str(tmp_path), BOTH, layers)[0]
        state = 3 * 4 * numel / 2  # values and two moments
        assert 2 * state <= stats.disk.bytes_read <= 2 * 1.8 * state  # per step values once more in both passes
        assert 1.8 * state <= stats.disk.bytes_written <= 2 * 1.1 * state  # the last ones may still be under way
        counters = 4 * 2 * (11 * layers + 4)
        peaks.append(stats.peak_total - stats.peak["optimizer"])
        assert stats.peak["optimizer"] <= counters and stats.peak["parameters"] == 0
    assert peaks[1] <= 1.05 * peaks[0]


@in_turn(home=MIXED, strategy=["ddp", "zero3", "zero3,param_dtype=bf16"])
def test_live_bytes_are_those_of_the_formula(strategy, home, tmp_path):
    for stats, formula in run(2, live_and_expected, at(strategy, home, str(tmp_path))):
        assert stats.live["parameters"] == formula.parameters
        counters = 4 * 2 * (11 * 3 + 4)
        assert 0.99 * formula.optimizer <= stats.live["optimizer"] <= formula.optimizer + counters
        assert stats.peak["gather_buffers"] <= 1.02 * formula.gather_buffers
        assert formula.offload_buffers <= stats.live["offload_buffers"] <= 1.2 * formula.offload_buffers + 4096 * 5


def live_and_expected(strategy: str) -> Any:
    model = shardwise.fully_shard(make(**SIZES), strategy=strategy)
    opt = adamw(model.parameters())
    for step in range(3):
        loss_of(model, batch(step, rank())).backward()
        opt.step()
        opt.zero_grad()
    return shardwise.stats(model), shardwise.expected(model)


# --- checkpoints and the rest of the library ---------------------------------------------------------------
@pytest.mark.parametrize("dtype", ["", ",param_dtype=bf16"])
def test_checkpoints(dtype, tmp_path):
    disk, plain = at("zero3" + dtype, BOTH, str(tmp_path)), "zero1" + dtype
    run(2, saved_and_resumed, str(tmp_path), disk, plain)
    run(2, saved_and_resumed, str(tmp_path), plain, disk)


def test_values_that_are_written_to(tmp_path):
    run(2, values_by_hand, str(tmp_path), "", FEW)


def test_accelerator_save_state_and_load_state(tmp_path):
    run(2, doors, str(tmp_path), FEW)


def test_a_path_that_is_missing_is_an_error_before_anything_moves(tmp_path):
    model = make()
    before = whole(model)
    with pytest.raises(shardwise.ShardwiseError, match="nowhere"):
        shardwise.fully_shard(model, strategy=at("zero3", "offload_params=nvme", str(tmp_path / "nowhere")))
    assert_same(whole(model), before)


def test_one_home_per_model(tmp_path):
    """Not one per unit: buffers are shared."""
    model = shardwise.fully_shard(make(), strategy=at("zero3", BOTH, str(tmp_path)))
    homes = {id(u.home) for u in shardwise.engine.build.require_engine(model).units}
    assert len(homes) == 1 and isinstance(model.head.weight._shardwise_unit.home, Home)


# --- units that nobody gathers after all ----------------------------------------------------------------
class Stops(nn.Module):
    """Large blocks, and a forward that may break off before the first."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2048, 2048, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor, stop: int | None = None) -> torch.Tensor:
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k == stop:
                raise KeyError("stop")
        return x


def broken_off(path: str) -> None:
    torch.manual_seed(0)
    plain = Stops()
    model = copy.deepcopy(plain)
    shardwise.fully_shard(
        model, strategy=f"ddp,offload_params=nvme,offload_prefetch=2,nvme_path={path}", units="Linear"
    )
    x = torch.randn(1, 2048)
    with torch.no_grad():
        expected = plain(x)
        for k in range(8):
            assert torch.equal(model(x), expected)
            with pytest.raises(KeyError):
                model(x, stop=k % 3)  # what is on its way here by then has arrived before its memory goes


def test_units_on_their_way_when_a_forward_breaks_off(tmp_path):
    run(1, broken_off, str(tmp_path))
