"""save_state and load_state: exact resume, hooks, registered objects, and what happens on bad days."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import shardwise
from models import PRESETS, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise import Accelerator, checkpoint
from shardwise.errors import CheckpointError
from shardwise.utils import DataLoaderConfiguration, GradScalerKwargs, ProjectConfiguration, set_seed
from slowly import in_turn


def everywhere(size, function, *args):
    return [function(*args)] if size == 1 else run(size, function, *args)


class Counter:
    def __init__(self):
        self.value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


class Run:
    """A training run with everything in it that has a state: dropout, a schedule, shuffled batches, fp16's scale."""

    def __init__(self, folder, strategy, precision="no", seed=0, automatic=True, total_limit=None):
        project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=automatic, total_limit=total_limit)
        self.accelerator = Accelerator(cpu=True, strategy=strategy, mixed_precision=precision, project_config=project)
        set_seed(seed, device_specific=True)
        model = make(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        ids = torch.randint(0, 31, (22, 6), generator=torch.Generator().manual_seed(1))
        loader = DataLoader(TensorDataset(ids, torch.arange(22)), batch_size=2, shuffle=True)
        prepared = self.accelerator.prepare(model, optimizer, schedule, loader)
        self.model, self.optimizer, self.schedule, self.loader = prepared
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)
        self.seen, self.losses = [], []

    def train(self, steps, save_after=()):
        """Steps over as many epochs as it takes; stops inside one."""
        done = 0
        while True:
            for ids, index in self.loader:
                logits = torch.nn.functional.dropout(self.model(ids[:, :-1]), 0.2)
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                self.accelerator.backward(loss)
                self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
                self.seen += index.tolist()
                self.losses.append(loss.item())
                self.counter.value += 1
                done += 1
                if done in save_after:
                    self.accelerator.save_state()
                if done == steps:
                    return self.seen, self.losses


def interrupted(folder, strategy, precision, resumed_strategy, at):
    """An uninterrupted run, and one that went on from a checkpoint in a process with other random states."""
    straight = Run(folder / "a", strategy, precision)
    straight.train(14, save_after=[at])
    for _ in range(rank() + 1):
        random.random(), np.random.rand(), torch.rand(3)
    resumed = Run(folder / "a", resumed_strategy, precision, seed=7)
    resumed.accelerator.load_state()
    assert resumed.counter.value == at
    resumed.train(14 - at)
    assert resumed.seen == straight.seen[2 * at :]
    assert resumed.losses == straight.losses[at:]
    assert resumed.schedule.get_last_lr() == straight.schedule.get_last_lr()
    if precision == "fp16":
        assert resumed.accelerator.scaler.get_scale() == straight.accelerator.scaler.get_scale()
    assert_same(whole(resumed.model), whole(straight.model))


@in_turn(preset=PRESETS, size=[1, 2])
def test_a_resumed_run_is_the_run(size, preset, tmp_path):
    everywhere(size, interrupted, tmp_path, preset, "no", preset, 4)


@pytest.mark.parametrize("at", [1, 6, 11])  # 11 batches in an epoch, 6 on each of two ranks
def test_resume_anywhere_in_an_epoch(at, tmp_path):
    everywhere(2, interrupted, tmp_path, "zero2", "no", "zero2", at)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_resume_in_mixed_precision(precision, tmp_path):
    run(2, interrupted, tmp_path, "zero3", precision, "zero3", 3)


def test_resume_under_another_strategy(tmp_path):
    run(2, interrupted, tmp_path, "zero3", "no", "ddp", 4)


def begin(folder, strategy, steps):
    one = Run(folder, strategy)
    one.train(steps, save_after=[steps])
    return one.seen, {k: v.numpy() for k, v in whole(one.model).items()}


def go_on(folder, strategy, steps):
    one = Run(folder, strategy, seed=5)
    one.accelerator.load_state()
    values = {k: v.numpy() for k, v in whole(one.model).items()}
    one.train(steps)
    return one.seen, values


def test_resume_on_another_number_of_ranks(tmp_path):
    began = run(2, begin, tmp_path, "zero3", 3)
    went_on = run(3, go_on, tmp_path, "zero2", 1)
    for key, value in began[0][1].items():
        assert np.array_equal(value, went_on[2][1][key]), key
    seen = [i for seen, _ in began + went_on for i in seen]
    assert len(seen) == len(set(seen)) == 3 * 4 + 3 * 2, "a sample came twice within the epoch"


def draws():
    """One number of each random generator."""
    return random.random(), float(np.random.rand()), torch.rand(()).item()


class Curve:
    """A run whose global batches are the same on every number of ranks: each rank has its part of them."""

    def __init__(self, folder, strategy, precision, seed):
        self.accelerator = Accelerator(
            cpu=True,
            strategy=strategy,
            mixed_precision=precision,
            project_config=ProjectConfiguration(str(folder), automatic_checkpoint_naming=True),
            dataloader_config=DataLoaderConfiguration(split_batches=True),
            gradient_accumulation_steps=2,
            kwargs_handlers=[GradScalerKwargs(init_scale=64.0, growth_interval=2)],
        )
        set_seed(seed, device_specific=True)
        model = make(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.8)
        ids = torch.randint(0, 31, (60, 6), generator=torch.Generator().manual_seed(1))
        loader = DataLoader(TensorDataset(ids, torch.arange(60)), batch_size=12, shuffle=True)
        prepared = self.accelerator.prepare(model, optimizer, schedule, loader)
        self.model, self.optimizer, self.schedule, self.loader = prepared
        self.counter = Counter()
        self.accelerator.register_for_checkpointing(self.counter)

    def facts(self):
        scaler = self.accelerator.scaler
        return self.counter.value, self.accelerator.step, None if scaler is None else scaler.state_dict()

    def train(self):
        """Endless micro-batches of 12 samples, 5 of them in an epoch and two in a step but for the fifth.

        Yields:
            The loss, this rank's samples, the learning rate.
        """
        while True:
            for ids, index in self.loader:
                with self.accelerator.accumulate(self.model):
                    logits = self.model(ids[:, :-1])
                    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.schedule.step()
                    self.optimizer.zero_grad()
                self.counter.value += 1
                self.accelerator.step += 1
                yield loss.item(), index.tolist(), self.schedule.get_last_lr()[0]


def straight(folder, strategy, precision, at, steps):
    """How a run goes on behind the checkpoint that it saves, and what it has there."""
    one = Curve(folder, strategy, precision, 0)
    train = one.train()
    for _ in range(at):
        next(train)
    one.accelerator.save_state()
    drawn, facts = draws(), one.facts()
    return [next(train) for _ in range(at, steps)], drawn, facts


def resumed(folder, strategy, precision, at, steps):
    one = Curve(folder, strategy, precision, 7)
    one.accelerator.load_state("latest")
    drawn, facts, train = draws(), one.facts(), one.train()
    return [next(train) for _ in range(at, steps)], drawn, facts


@pytest.mark.parametrize(
    ("strategies", "precision", "at"),
    [(("zero3", "zero1", "ddp", "zero2"), "no", 4), (("ddp", "zero3", "zero2", "hsdp,shard_size=2"), "fp16", 7)],
)
def test_the_loss_curve_goes_on_under_another_strategy_and_number_of_ranks(strategies, precision, at, tmp_path):
    """Everything that is saved: data, rates, steps of the accumulation, scale, registered objects, generators."""
    began = run(2, straight, tmp_path, strategies[1], precision, at, 9)
    for size, strategy in enumerate(strategies, 1):
        went_on = run(size, resumed, tmp_path, strategy, precision, at, 9)
        for k, step in enumerate(zip(*(went for went, _, _ in began), strict=True)):
            mine = [went[k] for went, _, _ in went_on]
            assert [i for _, samples, _ in mine for i in samples] == [i for _, samples, _ in step for i in samples]
            expected, got = (sum(loss for loss, _, _ in x) / len(x) for x in (step, mine))
            assert got == pytest.approx(expected, rel=1e-4 if precision == "no" else 5e-3)
            assert {rate for _, _, rate in mine} == {step[0][2]}
        assert all(facts == began[0][2] for _, _, facts in went_on)
        drawn, before = [d for _, d, _ in went_on], [d for _, d, _ in began]
        assert drawn[:2] == before[:size]
        assert len(set(drawn)) == size, "ranks that the other run did not have go on with generators of their own"


def through_skipping(folder):
    """The way of scripts written for Accelerate: count steps, and skip that many batches."""
    straight = Run(folder, "ddp")
    straight.train(14, save_after=[4])
    resumed = Run(folder, "ddp", seed=3)
    resumed.accelerator.load_state()
    resumed.loader, loader = resumed.accelerator.skip_first_batches(resumed.loader, 4), resumed.loader
    seen = [i for _, index in resumed.loader for i in index.tolist()]
    assert seen == straight.seen[8 : 8 + len(seen)] and len(seen) == 2 * (len(loader) - 4)
    following = [i for _, index in loader for i in index.tolist()]
    assert following[: 2 * (14 - len(loader))][: len(following)] == straight.seen[2 * len(loader) :][: len(following)]


@pytest.mark.parametrize("size", [1, 2])
def test_skip_first_batches_after_loading_skips_once(size, tmp_path):
    everywhere(size, through_skipping, tmp_path)


def two_strategies(folder):
    """Several models, each with its own strategy, in one Accelerator."""

    def build(seed):
        accelerator = Accelerator(cpu=True)
        one, two = make(seed), make(seed + 1, d=7)
        shardwise.fully_shard(one, strategy="zero3")
        optimizer = torch.optim.SGD([*one.parameters(), *two.parameters()], lr=0.1, momentum=0.9)
        one = accelerator.prepare(one)
        two = accelerator.prepare_model(two, strategy="zero1")
        return accelerator, one, two, accelerator.prepare(optimizer)

    def step(accelerator, one, two, optimizer):
        ids = torch.randint(0, 31, (2, 5), generator=torch.Generator().manual_seed(rank()))
        accelerator.backward(one(ids).square().mean() + two(ids).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    first = build(0)
    step(*first)
    first[0].save_state(folder / "both")
    step(*first)
    second = build(10)
    second[0].load_state(folder / "both")
    step(*second)
    assert_same(whole(first[1]), whole(second[1]))
    assert_same(whole(first[2]), whole(second[2]))
    from shardwise.engine.hooks import engine_of

    return [engine_of(m).strategy.preset for m in second[1:3]]


def test_several_models_each_with_its_own_strategy(tmp_path):
    assert run(2, two_strategies, tmp_path) == [["zero3", "zero1"]] * 2


# --- automatic names ------------------------------------------------------------------------------
def named(folder):
    one = Run(folder, "zero2", total_limit=2)
    assert not one.accelerator.has_checkpoint() and not one.accelerator.load_state(resume="latest")
    one.train(4, save_after=[1, 2, 3])
    assert one.accelerator.has_checkpoint() and one.accelerator.save_iteration == 3
    again = Run(folder, "zero2")
    assert again.accelerator.load_state(resume="latest")
    assert again.counter.value == 3 and again.accelerator.save_iteration == 3
    again.train(2, save_after=[2])
    assert checkpoint.read_manifest(folder / "checkpoints" / "checkpoint_3").info["step"] == 5  # what inspect shows
    third = Run(folder, "zero2")
    assert third.accelerator.load_state(folder / "checkpoints", resume="latest")
    with pytest.raises(CheckpointError, match="resume='newest'"):
        one.accelerator.load_state(resume="newest")
    fresh = Run(folder, "zero2")  # does not begin at 0 over what is there
    fresh.train(1, save_after=[1])
    return sorted(p.name for p in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("size", [1, 2])
def test_automatic_names(size, tmp_path):
    for names in everywhere(size, named, tmp_path):
        assert names == ["checkpoint_1", "checkpoint_2", "checkpoint_3", "checkpoint_4"]


def inside_a_window(folder):
    accelerator = Accelerator(cpu=True, strategy="zero2", gradient_accumulation_steps=2, project_dir=folder)
    model = accelerator.prepare(make(0))
    for index in (0, 1):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, batch(index, rank())))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            accelerator.save_state(folder / f"a{index}")
        said = any("inside an accumulation window" in str(w.message) for w in caught)
        assert said == (index == 0 and rank() == 0)


def test_saving_inside_a_window_is_said(tmp_path):
    run(2, inside_a_window, tmp_path)


def none_whole(folder):
    one = Run(folder, "zero2")
    one.train(1, save_after=[1])
    if rank() == 0:
        (folder / "checkpoints" / "checkpoint_0" / "state.pt").unlink()
    one.accelerator.wait_for_everyone()
    for look in (one.accelerator.has_checkpoint, lambda: one.accelerator.load_state(resume="latest")):
        with pytest.raises(CheckpointError, match="none of the checkpoints there is complete"):
            look()


def test_where_no_checkpoint_is_whole_a_run_does_not_begin_anew(tmp_path):
    run(2, none_whole, tmp_path)


def nowhere():
    with pytest.raises(CheckpointError, match="project_dir"):
        Accelerator(cpu=True).save_state()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        Accelerator(cpu=True, project_dir="there-is-no-such-folder").load_state()


@pytest.mark.parametrize("size", [1, 2])
def test_nowhere_to_save(size):
    everywhere(size, nowhere)


# --- hooks --------------------------------------------------------------------------------------
def hooked(folder):
    """As diffusers' scripts do: the model is saved by its own method, and left out of the checkpoint."""
    accelerator = Accelerator(cpu=True, strategy="zero2")
    model = accelerator.prepare(make(0))
    kept = accelerator.prepare(make(1, d=5))
    called = []

    def save(models, weights, output_dir):
        called.append("save")
        if accelerator.is_main_process:
            assert set(weights[0]) == set(models[0].state_dict())
            torch.save(weights[0], Path(output_dir) / "own.pt")
        weights.pop(0)

    def load(models, input_dir):
        called.append("load")
        models.pop(0).load_state_dict(torch.load(Path(input_dir) / "own.pt", weights_only=True))

    saving = accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    accelerator.save_state(folder / "hooked")
    before = whole(model), whole(kept)
    with torch.no_grad(), shardwise.gathered(model, write=True):
        for p in model.parameters():
            p.zero_()
    accelerator.load_state(folder / "hooked")
    assert_same(whole(model), before[0])
    assert_same(whole(kept), before[1])
    saving.remove()
    accelerator.save_state(folder / "plain")
    return called


@pytest.mark.parametrize("size", [1, 2])
def test_hooks(size, tmp_path):
    for called in everywhere(size, hooked, tmp_path):
        assert called == ["save", "load"]
    names = {p.name for p in (tmp_path / "hooked").iterdir()}
    assert "own.pt" in names and "own.pt" not in {p.name for p in (tmp_path / "plain").iterdir()}


# --- bad days -----------------------------------------------------------------------------------
def refuses(folder, path, words):
    one = Run(folder, "zero3", seed=4, automatic=False)
    before = whole(one.model)
    with pytest.raises(CheckpointError) as caught:
        one.accelerator.load_state(path, verify=True)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert_same(whole(one.model), before)


def test_a_missing_or_damaged_file_is_named(tmp_path):
    run(2, begin, tmp_path, "zero3", 2)
    good = tmp_path / "checkpoints" / "checkpoint_0"
    files = [p.name for p in good.iterdir() if p.is_file()]
    assert len(files) >= 5
    for name in files:
        for damage in ("missing", "short", "flipped"):
            bad = tmp_path / "bad"
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            data = bytearray((bad / name).read_bytes())
            if damage == "missing":
                (bad / name).unlink()
            elif damage == "short":
                (bad / name).write_bytes(data[: len(data) * 2 // 3])
            else:
                data[len(data) // 2] ^= 4
                (bad / name).write_bytes(data)
            run(2, refuses, tmp_path, bad, [name if name != "shardwise.json" or damage == "missing" else "bad"])
    run(2, refuses, tmp_path, tmp_path / "not there", ["not there"])


def other_things(folder):
    one = Run(folder, "ddp")
    one.accelerator.register_for_checkpointing(Counter())
    with pytest.raises(CheckpointError, match="1 registered objects, and 2"):
        one.accelerator.load_state()
    with pytest.raises(CheckpointError, match="no state_dict"):
        one.accelerator.register_for_checkpointing(object())
    with pytest.raises(CheckpointError, match="only strict"):
        one.accelerator.load_state(load_kwargs={"colour": "red"})


def test_other_things_than_were_saved(tmp_path):
    run(2, begin, tmp_path, "ddp", 1)
    run(2, other_things, tmp_path)


# --- models for others ---------------------------------------------------------------------------
def state_dicts(strategy):
    accelerator = Accelerator(cpu=True, strategy=strategy)
    model = make(0)
    expected = whole(model)
    model = accelerator.prepare(model)
    state = accelerator.get_state_dict(model)
    if rank() == 0 or strategy != "zero3":
        assert_same(dict(state), expected)
    else:
        assert state == {}


@pytest.mark.parametrize("preset", PRESETS)
def test_get_state_dict(preset):
    run(2, state_dicts, preset)


def saves_objects(folder):
    accelerator = Accelerator(cpu=True)
    accelerator.save({"w": torch.full((2,), float(rank()))}, folder / "one.pt")
    accelerator.save({"w": torch.full((2,), float(rank()))}, folder / "one.safetensors", safe_serialization=True)
    accelerator.wait_for_everyone()


def test_save(tmp_path):
    from safetensors.torch import load_file

    run(2, saves_objects, tmp_path)
    assert torch.load(tmp_path / "one.pt", weights_only=True)["w"].tolist() == [0, 0]
    assert load_file(tmp_path / "one.safetensors")["w"].tolist() == [0, 0]
