"""Accumulation windows that begin anew, models that are let go, and calls that windows do not allow."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

import shardwise
from models import PRESETS, assert_close, batch, loss_of, make, rank, whole, world
from ranks import run
from shardwise import Accelerator
from shardwise.errors import CommError, GradientError, UnitError
from shardwise.utils import GradScalerKwargs
from slowly import in_turn


def everywhere(size, function, *args):
    return [function(*args)] if size == 1 else run(size, function, *args)


def prepared(strategy, length, precision="no"):
    accelerator = Accelerator(
        cpu=True,
        strategy=strategy,
        gradient_accumulation_steps=length,
        mixed_precision=precision,
        kwargs_handlers=[GradScalerKwargs(init_scale=16.0)],
    )
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))


def micro(accelerator, model, optimizer, value):
    with accelerator.accumulate(model):
        accelerator.backward(model(torch.full((1, 1), value)).sum())
        optimizer.step()
        optimizer.zero_grad()
    return accelerator.sync_gradients


# --- a new window -------------------------------------------------------------------------------
def begins_anew(folder, strategy, how, precision):
    accelerator, model, optimizer = prepared(strategy, 4, precision)
    accelerator.save_state(folder)
    for _ in range(2):
        micro(accelerator, model, optimizer, 10.0)
    if how == "load_state":
        accelerator.load_state(folder)
    else:
        accelerator.free_memory()
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    ends = [micro(accelerator, model, optimizer, 1.0) for _ in range(4)]
    assert ends == [False, False, False, True]
    assert whole(model)["weight"].item() == -1.0


@in_turn(preset=PRESETS, how=["load_state", "free_memory"], size=[1, 2])
def test_a_window_begins_anew(preset, how, size, tmp_path):
    everywhere(size, begins_anew, tmp_path / "a", preset, how, "no")


@pytest.mark.parametrize("how", ["load_state", "free_memory"])
def test_a_window_begins_anew_in_fp16(how, tmp_path):
    begins_anew(tmp_path / "a", "ddp", how, "fp16")


def let_go(folder, strategy, length, precision):
    accelerator, model, optimizer = prepared(strategy, length, precision)
    for _ in range(3):
        micro(accelerator, model, optimizer, 1.0)
    accelerator.backward(model(torch.ones(1, 1)).sum())
    accelerator.save_state(folder)
    accelerator.load_state(folder)
    steps = accelerator._steps
    assert not steps._took_part and not steps._complete and not steps._applied
    dead = [weakref.ref(model), weakref.ref(model.weight), weakref.ref(optimizer)]
    model, optimizer = accelerator.free_memory(model, optimizer)
    gc.collect()
    assert [d() for d in dead] == [None, None, None]


@in_turn(preset=["ddp", "zero2", "zero3"], length=[1, 2], size=[1, 2])
def test_free_memory_lets_go_of_every_model(preset, length, size, tmp_path):
    everywhere(size, let_go, tmp_path / "a", preset, length, "fp16" if length == 2 else "no")


# --- calls that name what is wrong ----------------------------------------------------------------
def one_after_the_other(strategy):
    accelerator = Accelerator(cpu=True, strategy=strategy, gradient_accumulation_steps=2)
    a, b = accelerator.prepare(make(0), make(1, d=5))

    def micro(*models, of):
        with accelerator.accumulate(*models):
            for model in of:
                accelerator.backward(loss_of(model, batch(0, rank())))

    micro(a, of=[a])
    with pytest.raises(GradientError, match="in the middle of a window") as caught:
        micro(b, of=[b])
    assert "accumulate(a, b)" in str(caught.value)
    micro(a, b, of=[a, b])
    micro(a.blocks, of=[a])  # a part of it
    micro(nn.ModuleList([a]), of=[a])  # and a module around it
    micro(b, of=[b])  # a new window
    micro(of=[a, b])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [1, 2])
def test_a_window_is_of_all_models_in_it(preset, size):
    everywhere(size, one_after_the_other, preset)


def another_strategy(preset, other):
    accelerator = Accelerator(cpu=True, strategy=preset)
    model = make(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator.prepare(model, optimizer)
    assert accelerator.prepare(model) is model
    assert accelerator.prepare(model, strategy=preset) is model
    mine = shardwise.fully_shard(make(1), strategy=other)
    assert accelerator.prepare(mine) is mine and accelerator.prepare_model(mine, strategy=other) is mine
    for again, asked in ((model, other), (mine, preset)):
        with pytest.raises(UnitError, match=f"'{asked}'") as caught:
            accelerator.prepare(again, strategy=asked)
        assert "sharded under" in str(caught.value)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_sharded_model_is_not_prepared_under_another_strategy(preset):
    another_strategy(preset, "zero2" if preset == "zero3" else "zero3")


def different_calls(folder, call):
    accelerator = Accelerator(cpu=True, strategy="zero2")
    model = accelerator.prepare(make(0))
    calls = {
        "save_state": lambda: accelerator.save_state(folder),
        "async_save_state": lambda: accelerator.async_save_state(folder),
        "save_model": lambda: accelerator.save_model(model, folder),
        "load_state": lambda: accelerator.load_state(folder),
    }
    with pytest.raises(CommError) as caught:
        calls["load_state" if rank() else call]()
    return str(caught.value)


@pytest.mark.parametrize("call", ["save_state", "async_save_state", "save_model"])
def test_ranks_in_different_calls_are_told_which(call, tmp_path):
    for told in run(2, different_calls, tmp_path / "a", call):
        assert f"rank 0 came to {call}, rank 1 to load_state" in told


# --- schedules ------------------------------------------------------------------------------------
def one_cycle(strategy, split, steps):
    accelerator = Accelerator(cpu=True, strategy=strategy, split_batches=split, scheduler_per_process=True)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alone = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    total = steps if split else steps * world() - 1  # the last step of all ranks is one too many
    schedule, expected = (torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=total) for o in (optimizer, alone))
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    for _ in range(steps + 2 * (not split and world() > 1)):
        accelerator.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    alone.step()
    for _ in range(total if split or world() == 1 else total - 1):
        expected.step()
    assert schedule.get_last_lr() == expected.get_last_lr()


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_a_one_cycle_ends_where_ranks_step_together(size, split):
    run(size, one_cycle, "ddp", split, 7)


# --- no_sync ----------------------------------------------------------------------------------------
def shows_local_gradients(strategy, through):
    accelerator = Accelerator(cpu=True, strategy=strategy, gradient_accumulation_steps=2)
    model = make(0)
    plain = copy.deepcopy(model)
    model = accelerator.prepare(model)
    window = accelerator.accumulate if through == "accumulate" else accelerator.no_sync
    backward = accelerator.backward if through == "accumulate" else torch.Tensor.backward
    loss_of(plain, batch(0, rank())).backward()
    with window(model):
        backward(loss_of(model, batch(0, rank())))
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        if q.numel() and (through == "no_sync" or world() == 1 or strategy in ("ddp", "zero1")):
            assert_close({name: p.grad}, {name: q.grad})
    plain.zero_grad()
    parts = world() * (2 if through == "accumulate" else 1)
    for step in (0, 1):
        for r in range(world()):
            (loss_of(plain, batch(step, r)) / parts).backward()
    with accelerator.accumulate(model) if through == "accumulate" else nullcontext():
        backward(loss_of(model, batch(1, rank())))
    with shardwise.gathered(model, grads=True):
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.numel()}
    assert_close(found, {name: p.grad for name, p in plain.named_parameters() if p.numel()})


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("through", ["no_sync", "accumulate"])
@pytest.mark.parametrize("size", [1, 2])
def test_p_grad_shows_what_this_rank_has(preset, through, size):
    everywhere(size, shows_local_gradients, preset, through)


# --- compiled parts ----------------------------------------------------------------------------------
def partly_compiled(folder, strategy):
    from safetensors.torch import load_file

    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))

    accelerator = Accelerator(cpu=True, strategy=strategy)
    expected = build().state_dict()
    model = build()
    model[1] = torch.compile(model[1], backend="eager")
    model = accelerator.prepare(model)
    accelerator.save_model(model, folder)
    accelerator.wait_for_everyone()
    assert_close(load_file(folder / "model.safetensors"), expected)
    assert accelerator.unwrap_model(model) is model
    bare = accelerator.unwrap_model(model, keep_torch_compile=False)
    assert set(bare.state_dict()) == {"0.weight", "0.bias", "1._orig_mod.weight", "1._orig_mod.bias"}
    if rank() == 0 or strategy != "zero3":
        assert_close(dict(accelerator.get_state_dict(model)), expected)
    else:
        accelerator.get_state_dict(model)
    outer = torch.compile(build(), backend="eager")
    accelerator.prepare(outer)
    accelerator.save_model(outer, folder / "outer")
    accelerator.wait_for_everyone()
    assert_close(load_file(folder / "outer" / "model.safetensors"), expected)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [1, 2])
def test_models_with_compiled_parts_are_saved_under_clean_names(preset, size, tmp_path):
    everywhere(size, partly_compiled, tmp_path, preset)


# --- data ------------------------------------------------------------------------------------------
class Epochs(Dataset):
    epoch = -1

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return 10 * self.epoch + index


class Batches(Epochs):
    def __getitems__(self, indices):
        return [self[i] for i in indices]


@pytest.mark.parametrize("kind", [Epochs, Batches])
@pytest.mark.parametrize("persistent", [False, True])
def test_the_epoch_reaches_workers(kind, persistent):
    accelerator = Accelerator(cpu=True)
    given = kind()
    loader = accelerator.prepare(DataLoader(given, batch_size=2, num_workers=1, persistent_workers=persistent))
    for epoch in range(3):
        assert [v for b in loader for v in b.tolist()] == [10 * epoch + i for i in range(4)]
    loader.set_epoch(7)
    assert [v for b in loader for v in b.tolist()] == [70, 71, 72, 73]
    assert loader.dataset is given and given.epoch == 7


class Phased(BatchSampler):
    """A batch sampler of a script, which changes it while it trains."""

    phase = 0

    def __init__(self, sampler):
        super().__init__(sampler, 2, False)
        self.batches = 0

    def __iter__(self):
        for indices in super().__iter__():
            self.batches += 1
            yield [self.phase for _ in indices]


def visible(random):
    accelerator = Accelerator(cpu=True)
    data = list(range(8))
    mine = Phased(RandomSampler(data) if random else SequentialSampler(data))
    loader = accelerator.prepare(DataLoader(data, batch_sampler=mine))

    def read():
        return {v for b in loader for v in b.tolist()}

    mine.phase = 5
    assert read() == {5} and loader.batch_sampler.phase == 5
    loader.batch_sampler.phase = 6
    assert mine.phase == 6 and read() == {6}
    assert mine.batches == loader.batch_sampler.batches == 8
    assert isinstance(loader.batch_sampler, BatchSampler) and not hasattr(loader.batch_sampler, "nothing")


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_sampler_stays_the_scripts_own(random, size):
    everywhere(size, visible, random)
