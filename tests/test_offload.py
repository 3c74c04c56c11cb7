"""Optimizer state at home on the CPU or on a disk: the same bits as without, in a fixed amount of memory."""

from __future__ import annotations

import copy
import gc
import os
import re
import time
from collections.abc import Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.optim import lr_scheduler

import processes
import shardwise
from models import PRESETS, adamw, assert_same, batch, loss_of, make, rank, train, whole
from ranks import run
from shardwise.engine import build, elementwise
from shardwise.errors import OffloadError, OptimizerError
from shardwise.tiers.home import Home

HOMES = ["cpu", "nvme"]
ALL = [*PRESETS, "hsdp,shard_size=2"]
SIZES = {"d": 64, "vocab": 97, "odd": False}


def at(strategy: str, home: str, path: str) -> str:
    """A strategy whose optimizer state has another home, or what ``key=home`` says."""
    if home == "device":
        return strategy
    return f"{strategy},{home if '=' in home else f'offload_optimizer={home}'},nvme_path={path}"


every = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["in turn", "every"])
"""A strategy with each second home, and the next with the others; or each with all of them."""


def homes_for(index: int, homes: Sequence[str], every: bool) -> Sequence[str]:
    return homes if every else homes[index % 2 :: 2]


# --- the same bits ---------------------------------------------------------------------------------
def pairs(strategies: list[str], path: str, kw: dict[str, Any], homes: Sequence[str] = HOMES) -> None:
    for strategy in strategies:
        plain = train(strategy, **kw)
        for home in homes:
            losses, norms, weights = train(at(strategy, home, path), **kw)
            assert losses == plain[0], (strategy, home)
            assert norms == plain[1], (strategy, home)
            assert_same(weights, plain[2])
    gc.collect()


def pairs_in_turn(
    strategies: list[str], path: str, kw: dict[str, Any], every: bool, homes: Sequence[str] = HOMES, first: int = 0
) -> None:
    for index, strategy in enumerate(strategies):
        pairs([strategy], path, kw, homes_for(first + index, homes, every))


ON = {1: ["ddp", "zero3"], 2: PRESETS, 3: ["zero1", "zero3"], 4: ["zero2", "hsdp,shard_size=2"]}


@pytest.mark.parametrize("world", ON)
def test_same_bits_under_every_preset(world, tmp_path):
    strategies = ON[world]
    run(world, pairs, strategies, str(tmp_path), {"steps": 3, "clip": 0.5 if world > 1 else None})
    assert os.listdir(tmp_path) == []


@every
def test_same_bits_with_master_values_away(every, tmp_path):
    for first, dtype in enumerate(("bf16", "fp16")):
        strategies = [f"{s},param_dtype={dtype}" for s in [*ALL, "zero1,layout=tensor"]]
        run(2, pairs_in_turn, strategies, str(tmp_path), {"steps": 3}, every, HOMES, first)


OPTIMIZERS: dict[str, Any] = {
    "foreach": partial(torch.optim.AdamW, lr=0.01, foreach=True),
    "fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
    "amsgrad": partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "stateless": partial(torch.optim.SGD, lr=0.1),
    "ASGD": partial(torch.optim.ASGD, lr=0.05),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.005, momentum=0.5, centered=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_kind_of_state(name, tmp_path):
    run(2, pairs, ["zero3", "zero1,param_dtype=bf16"], str(tmp_path), {"steps": 3, "optimizer": OPTIMIZERS[name]})


def whole_tensors(home: str, path: str, preset: str) -> dict[str, torch.Tensor]:
    """Two optimizers with state of odd shapes, over the same units."""
    model = make()
    shardwise.fully_shard(model, strategy=at(f"{preset},layout=tensor", home, path))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and p.numel() and "embed" not in n]
    embed, rest = [model.embed.weight], [p for p in model.parameters() if p.ndim < 2]
    opts = [
        torch.optim.Muon(matrices, lr=0.02),
        torch.optim.Adafactor(embed, lr=0.01),
        torch.optim.AdamW(rest, lr=0.01),
    ]
    for step in range(3):
        loss_of(model, batch(step, rank())).backward()
        for o in opts:
            o.step()
            o.zero_grad()
    return whole(model)


def several(path: str, every: bool) -> None:
    for index, preset in enumerate(ALL):
        plain = whole_tensors("device", path, preset)
        for home in homes_for(index, HOMES, every):
            assert_same(whole_tensors(home, path, preset), plain)


@every
def test_whole_tensors_and_several_optimizers(every, tmp_path):
    run(2, several, str(tmp_path), every)


def long_story(home: str, path: str, strategy: str) -> dict[str, torch.Tensor]:
    """Frozen parameters that thaw, an added group, a schedule, accumulation under no_sync, gradients by hand."""
    model = make()
    model.embed.requires_grad_(False)
    shardwise.fully_shard(model, strategy=at(strategy, home, path))
    opt = torch.optim.AdamW(list(model.blocks.parameters()), lr=0.01)
    schedule = lr_scheduler.LambdaLR(opt, lambda k: 0.0 if k == 1 else 1 / (k + 1))
    for step in range(5):
        if step == 2:
            opt.add_param_group({"params": [*model.head.parameters(), *model.norm.parameters()], "lr": 0.05})
            schedule = lr_scheduler.LambdaLR(opt, lambda k: 1 / (k + 1))
        if step == 3:
            model.embed.requires_grad_(True)
            opt.add_param_group({"params": list(model.embed.parameters()), "lr": 0.05})
            schedule = lr_scheduler.LambdaLR(opt, lambda k: 1 / (k + 1))
        with shardwise.no_sync(model):
            loss_of(model, batch(step, rank())).backward()
        loss_of(model, batch(50 + step, rank())).backward()
        if step == 4:  # a unit without gradients is left alone
            for p in model.blocks[1].parameters():
                p.grad = None
            model.norm.weight.grad = torch.full_like(model.norm.weight, 0.5)
        shardwise.clip_grad_norm_(model, 0.3)
        opt.step()
        schedule.step()
        opt.zero_grad()
        with torch.no_grad():
            model(batch(7, 0)[:, :-1])
    return whole(model)


def stories(path: str, strategies: list[str], homes: Sequence[str] = HOMES, every: bool = True) -> None:
    for index, strategy in enumerate(strategies):
        plain = long_story("device", path, strategy)
        for home in homes_for(index, homes, every):
            assert_same(long_story(home, path, strategy), plain)


@every
def test_frozen_added_scheduled_accumulated(every, tmp_path):
    strategies = [*ALL, "zero3,param_dtype=bf16", "zero2,param_dtype=bf16"]
    run(2, stories, str(tmp_path), strategies, HOMES, every)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.75])
def test_a_part_of_the_state_stays(ratio, tmp_path):
    extra = f",offload_ratio={ratio}"
    run(2, pairs, ["zero1" + extra, "zero3,param_dtype=bf16" + extra], str(tmp_path), {"steps": 3})


@pytest.mark.parametrize("ratio", [0.25, 0.9])
def test_that_part_is_exact_in_bytes(ratio, tmp_path):
    strategy = f"zero3,param_dtype=bf16,offload_ratio={ratio}"
    for stats, formula, _, numel in run(2, traffic, str(tmp_path), strategy, 6):
        state = 3 * 4 * numel / 2
        assert abs(stats.disk.bytes_read - ratio * state) <= 0.02 * state
        assert abs(stats.disk.bytes_written - ratio * state) <= 0.02 * state
        assert abs(stats.live["optimizer"] - (1 - ratio) * state) <= 0.02 * state
        assert abs(stats.live["optimizer"] - formula.optimizer) <= 0.02 * state


@pytest.mark.parametrize("buffers", [1, 2, 5])
def test_any_number_of_buffers(buffers, tmp_path):
    run(2, pairs, [f"zero2,offload_buffers={buffers}", f"zero3,param_dtype=bf16,offload_buffers={buffers}"],
        str(tmp_path), {"steps": 3})  # fmt: skip


def closures(path: str) -> None:
    results = []
    for home in ("device", *HOMES):
        model = shardwise.fully_shard(make(), strategy=at("zero3", home, path))
        opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

        def closure(step, model, opt):
            opt.zero_grad()
            loss = loss_of(model, batch(step, rank()))
            loss.backward()
            return loss

        losses = [opt.step(partial(closure, step, model, opt)).item() for step in range(3)]
        results.append((losses, whole(model)))
    for losses, weights in results[1:]:
        assert losses == results[0][0]
        assert_same(weights, results[0][1])


def test_step_with_a_closure(tmp_path):
    run(2, closures, str(tmp_path))


# --- a device whose memory is not the host's -----------------------------------------------------------
@contextmanager
def separate_memory():
    """The path that a CUDA device takes (gradients to the host, values back), with a CPU at both ends."""
    with mock.patch.object(build, "Home", partial(Home, separate=True)):
        yield


def over_the_link(path: str, every: bool) -> None:
    for index, strategy in enumerate([*ALL, "zero3,layout=tensor"]):
        plain = train(strategy, steps=3)
        with separate_memory():
            for home in homes_for(index, HOMES, every):
                losses, norms, weights = train(at(strategy, home, path), steps=3)
                assert (losses, norms) == plain[:2], (strategy, home)
                assert_same(weights, plain[2])
    plain = long_story("device", path, "zero3")
    with separate_memory():
        assert_same(long_story("nvme", path, "zero3"), plain)
        values_by_hand(path, "")


@every
def test_same_bits_when_gradients_and_values_are_copied(every, tmp_path):
    run(2, over_the_link, str(tmp_path), every)


def link_bytes(path: str, home: str) -> Any:
    strategy = at("zero2,param_dtype=bf16", home, path)
    with separate_memory():
        model = shardwise.fully_shard(make(**SIZES), strategy=strategy)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for k in range(8):
        shardwise.reset_stats(model)
        loss = loss_of(model, batch(k % 2, rank()))
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return shardwise.stats(model), losses, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("home", HOMES)
def test_gradients_cross_the_link_once_in_the_compute_dtype(home, tmp_path):
    for stats, losses, numel in run(2, link_bytes, str(tmp_path), home):
        assert 2 * numel / 2 <= stats.to_host <= 1.02 * 2 * numel / 2
        assert 2 * numel / 2 <= stats.to_device <= 1.02 * 2 * numel / 2
        assert losses[-1] < 0.8 * losses[0]


# --- memory and traffic -------------------------------------------------------------------------------


def traffic(path: str, strategy: str, layers: int) -> Any:
    strategy += ",offload_overlap=false"  # so that a step's traffic is over when it is
    model = shardwise.fully_shard(make(layers=layers, **SIZES), strategy=at(strategy, "nvme", path))
    opt = adamw(model.parameters())
    for step in range(3):
        loss_of(model, batch(step, rank())).backward()
        if step == 2:
            shardwise.reset_stats(model)
        opt.step()
        opt.zero_grad()
    until = time.monotonic() + 20
    while (stats := shardwise.stats(model)).disk.writes < stats.disk.reads and time.monotonic() < until:
        time.sleep(0.01)  # the last units are still being written
    with shardwise.memory_meter(model) as meter:
        loss_of(model, batch(9, rank())).backward()
        opt.step()
        opt.zero_grad()
    return stats, shardwise.expected(model), meter.peak, sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero3", "zero3,param_dtype=bf16"])
def test_host_memory_is_a_fixed_number_of_buffers(strategy, tmp_path):
    live = []
    for layers in (2, 8):
        for stats, formula, peak, numel in run(2, traffic, str(tmp_path), strategy, layers):
            masters = 1 if "bf16" in strategy else 0
            state = (2 + masters) * 4 * numel // (1 if strategy == "ddp" else 2)
            assert state <= stats.disk.bytes_read <= 1.1 * state  # each byte is read once, and written once
            assert state <= stats.disk.bytes_written <= 1.1 * state
            assert stats.live["optimizer"] <= 4 * 2 * (11 * layers + 4), "step counters, and nothing else"
            assert stats.live["parameters"] == formula.parameters
            assert formula.optimizer == 0
            assert formula.offload_buffers <= stats.live["offload_buffers"] <= 1.2 * formula.offload_buffers
            assert peak["offload_buffers"] == stats.live["offload_buffers"]
            assert 0 <= stats.disk.hidden <= 1 and stats.disk.busy_s > 0
            live.append(stats.live["offload_buffers"])
    assert len(set(live)) == 1, "whatever the model's size"


# --- state that is looked at --------------------------------------------------------------------------
def looked_at(path: str) -> None:
    model = shardwise.fully_shard(make(), strategy=at("zero2", "nvme", path))
    plain = shardwise.fully_shard(make(), strategy="zero2")
    opt, ref = adamw(model.parameters()), adamw(plain.parameters())

    def step(k):
        for m, o in ((model, opt), (plain, ref)):
            loss_of(m, batch(k, rank())).backward()
            o.step()
            o.zero_grad()

    step(0)
    tensors = [s["exp_avg"] for s in opt.state.values() if s["exp_avg"].numel() and s["exp_avg"].dim()]
    first = tensors[0]
    assert first.dtype == torch.float32 and first.shape == first.size()
    for look in (lambda: first + 1, lambda: first.sum(), first.item, lambda: first.mul_(0), lambda: first[0],
                 lambda: torch._foreach_norm([first]), lambda: copy.deepcopy(first), first.numpy, first.tolist,
                 lambda: first.copy_(torch.zeros_like(first)), lambda: first.data):  # fmt: skip
        with pytest.raises(OffloadError, match="optimizer_state"):
            look()
    assert "exp_avg" in repr(first)
    with shardwise.optimizer_state(opt) as state:
        order = opt.state_dict()["state"]
        assert len(order) == len(state)
        for k, theirs in ref.state_dict()["state"].items():
            mine = order[k]
            for key in theirs:
                assert torch.equal(mine[key], theirs[key])
            mine["exp_avg"].mul_(0.5)
            theirs["exp_avg"].mul_(0.5)
    with pytest.raises(OffloadError):
        first.sum()
    step(1)
    assert any(s["exp_avg"] is first for s in opt.state.values()), "the same objects"
    assert_same(whole(model), whole(plain))
    mine, theirs = opt.state_dict(), ref.state_dict()
    assert mine["state"].keys() == theirs["state"].keys()
    for k, values in theirs["state"].items():
        for key, value in values.items():
            assert torch.equal(mine["state"][k][key], value)
    other = adamw(model.parameters())
    shardwise.attach(other)
    other.load_state_dict(mine)
    with pytest.raises(OffloadError):
        next(s["exp_avg"] for s in other.state.values() if s["exp_avg"].numel()).sum()
    opt = other  # the old one, and its space with it, is gone
    step_with(model, other, 2)
    step_with(plain, ref, 2)
    assert_same(whole(model), whole(plain))


def step_with(model: torch.nn.Module, opt: torch.optim.Optimizer, k: int) -> None:
    loss_of(model, batch(k, rank())).backward()
    opt.step()
    opt.zero_grad()


def test_state_that_is_away_is_never_garbage(tmp_path):
    run(2, looked_at, str(tmp_path))


# --- checkpoints and values ---------------------------------------------------------------------------
def saved_and_resumed(path: str, source: str, target: str) -> None:
    def build(strategy):
        model = shardwise.fully_shard(make(), strategy=strategy)
        return model, adamw(model.parameters())

    model, opt = build(source)
    for k in range(2):
        step_with(model, opt, k)
    from shardwise import checkpoint

    folder = Path(path) / "saved"
    checkpoint.save(folder, models=[model], optimizers=[opt])
    step_with(model, opt, 2)
    expected = whole(model)
    for strategy in (target, source):
        other, mine = build(strategy)
        step_with(other, mine, 5)  # what is there already gives way
        checkpoint.load(folder, models=[other], optimizers=[mine])
        step_with(other, mine, 2)
        assert_same(whole(other), expected)
        counts = {int(s["step"]) for s in mine.state.values()}
        assert counts == {3}
    checkpoint.load(folder, models=[model], optimizers=[opt])
    step_with(model, opt, 2)
    assert_same(whole(model), expected)


@pytest.mark.parametrize("dtype", ["", ",param_dtype=bf16"])
def test_checkpoints_to_and_from_the_disk(dtype, tmp_path):
    disk, plain = at("zero3" + dtype, "nvme", str(tmp_path)), "zero1" + dtype
    run(2, saved_and_resumed, str(tmp_path), disk, plain)
    run(2, saved_and_resumed, str(tmp_path), plain, disk)


def values_by_hand(path: str, extra: str, homes: Sequence[str] = ("nvme",)) -> None:
    results = []
    for preset in ALL:
        for home in ("device", *homes):
            model = shardwise.fully_shard(make(), strategy=at(preset + extra, home, path))
            opt = adamw(model.parameters())
            step_with(model, opt, 0)
            with shardwise.gathered(model, write=True), torch.no_grad():
                model.head.weight.mul_(0.5)
            step_with(model, opt, 1)
            state = model.state_dict()
            model.load_state_dict({k: v * 0.9 for k, v in state.items()})
            step_with(model, opt, 2)
            results.append((preset, whole(model)))
    for preset, weights in results[1:]:
        assert_same(weights, dict(results)[preset])


def test_values_that_are_written_to(tmp_path):
    run(2, values_by_hand, str(tmp_path), ",param_dtype=bf16")


# --- other parts of the library -------------------------------------------------------------------------
def local_sgd(path: str) -> None:
    results = []
    for home in ("device", *HOMES):
        model = shardwise.fully_shard(make(), strategy=at("ddp,param_dtype=bf16", home, path))
        opt = adamw(model.parameters())
        accelerator = shardwise.Accelerator(cpu=True)
        with shardwise.LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=2) as local:
            for k in range(4):
                step_with(model, opt, k)
                local.step()
        results.append(whole(model))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_local_sgd(tmp_path):
    run(2, local_sgd, str(tmp_path))


def through_the_door(path: str, home: str) -> dict[str, torch.Tensor]:
    """Accelerate's way: an uneven number of batches, accumulation, clipping, states saved and loaded in the middle."""
    accelerator = shardwise.Accelerator(cpu=True, gradient_accumulation_steps=2, strategy=at("zero2", home, path))
    model = make()
    model, opt = accelerator.prepare(model, adamw(model.parameters()))
    folder = Path(path) / f"state-{home}"

    def steps(first, last):
        for k in range(first, last):
            with accelerator.accumulate(model):
                accelerator.backward(loss_of(model, batch(k, rank())))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                opt.step()
                opt.zero_grad()

    steps(0, 4)
    accelerator.save_state(str(folder))
    steps(4, 6)
    expected = whole(model)
    accelerator.load_state(str(folder))
    steps(4, 6)
    assert_same(whole(model), expected)
    return expected


def doors(path: str, homes: Sequence[str] = HOMES) -> None:
    plain = through_the_door(path, "device")
    for home in homes:
        assert_same(through_the_door(path, home), plain)


def test_accelerator_save_state_and_load_state(tmp_path):
    run(2, doors, str(tmp_path))


# --- bad days -------------------------------------------------------------------------------------------
def missing(path: str) -> str:
    with pytest.raises(OffloadError) as error:
        shardwise.fully_shard(make(), strategy=at("zero2", "nvme", path))
    return str(error.value)


def test_a_path_that_is_missing(tmp_path):
    for rank_, text in enumerate(run(2, missing, str(tmp_path / "nowhere"))):
        assert "nowhere" in text and f"rank {rank_}" in text and "fix:" in text


def one_missing(path: str) -> str:
    return missing(path if rank() == 0 else path + "/nowhere")


def test_a_path_that_is_missing_on_one_rank(tmp_path):
    texts = run(2, one_missing, str(tmp_path))
    assert "rank 1 has no place" in texts[0] and "nowhere" in texts[1]


SCRIPT = """
import os, resource, signal, sys, time
import torch
import shardwise
from shardwise.engine import offload
from models import adamw, batch, loss_of, make

strategy, what = sys.argv[1:]
rank = int(os.environ["RANK"])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
torch.set_num_threads(1)
shardwise.init("cpu")
model = shardwise.fully_shard(make(), strategy=strategy + ",timeout=20")
opt = adamw(model.parameters())
for step in range(4):
    if step == (0 if what == "full" else 2) and rank == 1:
        if what == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, -1))
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "terminated":  # when its update has begun
            offload.update = lambda *_: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(60)
        if what == "corrupt":
            for unit in model._shardwise_engine.units:
                unit.drain()  # of what would be written over it
                unit.home.disk.drain()
            for bucket in (b for unit in model._shardwise_engine.units for b in unit.buckets):
                os.pwrite(os.open(f"/proc/self/fd/{bucket.values.state_extent.extent.fd}", os.O_RDWR), b"xxxxxxxx", 0)
    loss_of(model, batch(step, rank)).backward()
    opt.step()
    opt.zero_grad()
print("not reached")
"""


def bad_day(tmp_path: Path, what: str, homes: str = "nvme") -> tuple[list[int], list[str]]:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "disk").mkdir(exist_ok=True)
    strategy = at("zero2", homes, str(tmp_path / "disk"))
    ranks = processes.ranks_of_a_script(tmp_path / "script.py", 2, strategy, what, whole_end=True)
    ended = [process.finish() for process in ranks]
    return [code for code, _, _ in ended], [err for _, _, err in ended]


def test_a_full_disk_on_one_rank_ends_every_rank(tmp_path):
    codes, errors = bad_day(tmp_path, "full")
    assert all(code != 0 for code in codes), errors
    assert re.search("ulimit -f|File too large|file size", errors[1]), errors[1]
    assert "OffloadError" in errors[1] and "fix:" in errors[1] and "Traceback" not in errors[1]
    assert "rank 1" in errors[0]
    assert os.listdir(tmp_path / "disk") == []


@pytest.mark.parametrize("what", ["killed", "terminated"])
def test_a_killed_rank_leaves_nothing_that_the_next_start_does_not_remove(what, tmp_path):
    codes, errors = bad_day(tmp_path, what)
    assert all(code != 0 for code in codes)
    assert "rank 0" in errors[0], errors
    (left,) = os.listdir(tmp_path / "disk")
    assert left.startswith("shardwise-swap-r1-") and os.listdir(tmp_path / "disk" / left) == ["owner.json"]
    run(2, pairs, ["zero2"], str(tmp_path / "disk"), {"steps": 1})
    assert os.listdir(tmp_path / "disk") == []


def test_a_corrupt_extent_is_found_when_asked_to_look(tmp_path):
    codes, errors = bad_day(tmp_path, "corrupt", "offload_params=nvme,offload_optimizer=nvme,offload_checksum=true")
    assert all(code != 0 for code in codes), errors
    assert "are not those that were written (checksum differs)" in errors[1] and "rank 1" in errors[1], errors[1]
    assert "Traceback" not in errors[1] and "rank 1" in errors[0]
    assert os.listdir(tmp_path / "disk") == []


def with_checksums(path: str) -> None:
    pairs(["zero3,param_dtype=bf16,offload_checksum=true"], path, {"steps": 3}, ["nvme", "offload_params=nvme"])


def test_same_bits_with_checksums(tmp_path):
    run(2, with_checksums, str(tmp_path))


def read_only(path: str) -> str:
    if os.geteuid() == 0:  # root writes everywhere but where nobody can
        path = "/proc"
    with pytest.raises(OffloadError) as error:
        shardwise.fully_shard(make(), strategy=at("zero2", "nvme", path))
    return str(error.value)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "disk").mkdir(mode=0o555)
    for text in run(2, read_only, str(tmp_path / "disk")):
        assert "fix:" in text


class Counting(torch.optim.SGD):
    """Counts its steps in its groups, and one kind of them depends on all parameters."""

    def __init__(self, params: Any, mixed: bool) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.mixed = mixed

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + (sum(p.numel() for p in group["params"]) if self.mixed else 1)
            group["lr"] = 0.1 / group["k"] if not self.mixed else 0.1
        return super().step(closure)


def counting(path: str) -> None:
    with mock.patch.object(elementwise, "ELEMENTWISE", {*elementwise.ELEMENTWISE, "Counting"}):
        plain = train("zero2", optimizer=partial(Counting, mixed=False))
        for home in HOMES:
            assert_same(train(at("zero2", home, path), optimizer=partial(Counting, mixed=False))[2], plain[2])
        with pytest.raises(OptimizerError, match="unit by unit"):
            train(at("zero2", "nvme", path), optimizer=partial(Counting, mixed=True))


def test_optimizers_that_count_in_their_groups(tmp_path):
    run(2, counting, str(tmp_path))


# --- gradients on the host -------------------------------------------------------------------------------
GRADS = [
    "offload_grads=cpu", "offload_grads=cpu,offload_optimizer=cpu", "offload_grads=cpu,offload_optimizer=nvme",
    "offload_grads=cpu,offload_optimizer=cpu,offload_params=cpu", "offload_grads=cpu,offload_params=nvme",
    "offload_grads=cpu,offload_optimizer=nvme,offload_params=nvme",
]  # fmt: skip


def grads_on_the_host(path: str, world: int, every: bool) -> None:
    for index, strategy in enumerate(ON[world]):
        plain = train(strategy, steps=3)
        with separate_memory():
            for homes in homes_for(index, GRADS, every):
                losses, norms, weights = train(at(strategy, homes, path), steps=3)
                assert (losses, norms) == plain[:2], (strategy, homes)
                assert_same(weights, plain[2])
    if world == 2:
        with separate_memory():
            stories(path, ["ddp", "zero3"], GRADS[1:3])
            doors(path, GRADS[2:3])


@every
@pytest.mark.parametrize("world", [1, 2, 4])
def test_same_bits_with_gradients_on_the_host(world, every, tmp_path):
    run(world, grads_on_the_host, str(tmp_path), world, every)


def grads_of_a_device(path: str) -> Any:
    """On a CPU device the host is the device."""
    return train(at("zero2", GRADS[1], path), steps=2), train("zero2", steps=2)


def test_on_a_cpu_gradients_stay_where_they_are(tmp_path):
    for mine, plain in run(2, grads_of_a_device, str(tmp_path)):
        assert mine[:2] == plain[:2]
        assert_same(mine[2], plain[2])


def grad_traffic(path: str, homes: str, micro_batches: int) -> Any:
    with separate_memory():
        model = shardwise.fully_shard(make(**SIZES), strategy=at("zero2,param_dtype=bf16", homes, path))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    for k in range(3):
        shardwise.reset_stats(model)
        for m in range(micro_batches):
            loss_of(model, batch(10 * k + m, rank())).backward()
        norm = shardwise.clip_grad_norm_(model, 0.1)
        shown = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(shown, torch.clamp(norm, max=0.1), rtol=1e-4, atol=1e-6)
        opt.step()
        opt.zero_grad()
    return shardwise.stats(model), shardwise.expected(model), sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_gradients_cross_once_per_reduce_in_the_compute_dtype(micro_batches, tmp_path):
    for stats, formula, numel in run(2, grad_traffic, str(tmp_path), GRADS[1], micro_batches):
        held = 2 * numel / 2
        assert micro_batches * held <= stats.to_host <= 1.02 * micro_batches * held
        assert held <= stats.to_device <= 1.02 * held
        assert stats.live["gradients"] == formula.gradients


def part_on_the_device(path: str, ratio: float) -> Any:
    strategy = at(f"zero3,offload_ratio={ratio}", "cpu", path)
    plain = train("zero3", steps=3)
    with separate_memory():
        losses, norms, weights = train(strategy, steps=3)
        model = shardwise.fully_shard(make(layers=12, **SIZES), strategy=strategy)
    assert (losses, norms) == plain[:2]
    assert_same(weights, plain[2])
    buckets = [b for u in shardwise.engine.build.require_engine(model).units for b in u.buckets]
    away = sum(b.master.numel() for b in buckets if b.placement.step_on_host)
    return away / sum(b.master.numel() for b in buckets), max(b.master.numel() for b in buckets)


@pytest.mark.parametrize("ratio", [0.25, 0.6])
def test_a_part_of_the_units_stays_on_the_device(ratio, tmp_path):
    for part, _ in run(2, part_on_the_device, str(tmp_path), ratio):
        assert abs(part - ratio) <= 0.06
