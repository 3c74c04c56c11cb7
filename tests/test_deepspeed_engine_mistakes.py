"""What goes wrong with an engine: one clear error on every rank, in time, and the engine goes on where it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import shardwise.deepspeed as deepspeed
from models import assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise.errors import CheckpointError, ConfigError, OptimizerError, ShardwiseError
from test_deepspeed_engine import adamw, engine_for, settings

ADAM = {"optimizer": {"type": "Adam", "params": {"lr": 1e-2}}}


def step(engine, index=0, **kwargs):
    engine.backward(loss_of(engine, batch(index, rank())))
    engine.step(**kwargs)


def first_or_not(first, others):
    return first if rank() == 0 else others


def apart():
    """Ranks that are given different things."""
    found = []

    def wrong(**kwargs):
        with pytest.raises(ConfigError) as error:
            deepspeed.initialize(**{"model": make(), "optimizer": adamw} | kwargs)
        found.append(str(error.value))

    wrong(config=settings(first_or_not(3, 1)))
    wrong(config=settings(2, first_or_not(1, 2)))
    wrong(config=settings(2) | first_or_not({}, {"zero_optimisation": {}}))
    wrong(config=settings(2), lr_scheduler=first_or_not(None, cosine))
    wrong(config=settings(2), model=first_or_not(make(), nn.Linear(3, 3)))
    engine, *_ = engine_for(settings(3))
    step(engine)
    return found


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)


def test_ranks_that_are_given_different_things():
    results = run(2, apart)
    for found in results:
        words = ["preset=zero3", "batch sizes", "zero_optimisation", "the scheduler", "the model"]
        for word, text in zip(words, found, strict=True):
            assert word in text, text
    assert "rank 1" in results[0][2], "the others hear whose configuration it is"


def asked_apart(folder):
    """Ranks that load different things, and folders that something is wrong with."""
    engine, *_ = engine_for(settings(3))
    step(engine)
    with pytest.raises(CheckpointError, match="client_state is a list"):
        engine.save_checkpoint(folder, client_state=[1])
    with pytest.raises(CheckpointError, match="client_state is a list"):
        engine.save_checkpoint(folder, client_state=first_or_not([1], {}))
    for tag in ("", "..", "../beside"):
        with pytest.raises(CheckpointError, match="names no folder"):
            engine.save_checkpoint(folder, tag)
    assert not list(Path(folder).glob("*"))
    engine.save_checkpoint(folder, "good")
    before = whole(engine.module)
    step(engine, 1)
    moved = whole(engine.module)
    for asked in (
        {"tag": first_or_not("good", None)},
        {"tag": first_or_not(None, "good")},
        {"tag": first_or_not("good", "other")},
        {"load_optimizer_states": rank() == 0},
        {"load_module_only": rank() == 0},
    ):
        with pytest.raises(CheckpointError, match="ranks ask for different things"):
            engine.load_checkpoint(folder, **asked)
    if rank() == 0:
        shutil.copytree(folder, folder + "-empty")
        Path(folder + "-empty", "latest").write_text("")
        shutil.copytree(folder, folder + "-half")
        max(Path(folder + "-half").rglob("*.distcp"), key=lambda p: p.stat().st_size).unlink()
    torch.distributed.barrier()
    for name in ("empty", "half"):
        with pytest.raises(CheckpointError):
            engine.load_checkpoint(f"{folder}-{name}")
    assert_same(whole(engine.module), moved)
    engine.load_checkpoint(folder)
    assert_same(whole(engine.module), before)
    engine.save_checkpoint(folder, "at once")  # with no step between
    step(engine, 1)
    assert_same(whole(engine.module), moved)
    other, *_ = engine_for(settings(1))
    other.load_checkpoint(folder)
    step(other, 1)
    assert_same(whole(other.module), moved)


def test_ranks_that_ask_for_different_things(tmp_path):
    run(2, asked_apart, str(tmp_path / "run"))


def arguments():
    def made(**kwargs):
        return deepspeed.initialize(**{"model": make(), "config": settings(2) | ADAM} | kwargs)[0]

    def refused(**kwargs):
        with pytest.raises(ShardwiseError) as error:
            made(**kwargs)
        return str(error.value)

    engine = made(lr_scheduler=exponential)
    step(engine)
    assert engine.get_lr() == [pytest.approx(5e-3)]
    assert isinstance(made(lr_scheduler=OnlyOptimizer).lr_scheduler, OnlyOptimizer)
    assert made(lr_scheduler=lambda optimizer: None).lr_scheduler is None
    assert "has no step()" in refused(lr_scheduler="cosine")
    assert "optimizer= is a str" in refused(optimizer="adam")
    assert "engine already" in refused(model=engine)
    assert "'1e-2'" in refused(config=settings(2) | {"optimizer": {"type": "Adam", "params": {"lr": "1e-2"}}})
    plateau = made(lr_scheduler=plateaus)
    with pytest.raises(OptimizerError, match="lr_kwargs"):
        step(plateau)
    plateau.step(lr_kwargs={"metrics": 1.0})
    step(plateau, lr_kwargs={"metrics": 2.0})
    assert plateau.global_steps == 2 and plateau.get_lr() == [pytest.approx(1e-3)]
    for wrong in ("8", None, 2.5):
        with pytest.raises(ConfigError):
            plateau.set_train_batch_size(wrong)
        with pytest.raises(ConfigError):
            plateau.set_train_micro_batch_size(wrong)
    plateau.destroy()
    with pytest.raises(OptimizerError, match="destroy"):
        plateau.step()


class OnlyOptimizer(torch.optim.lr_scheduler.LambdaLR):
    """A class that needs nothing else is a function of the optimizer."""

    def __init__(self, optimizer):
        super().__init__(optimizer, lambda step: 0.5**step)


def exponential(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def plateaus(optimizer):
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)


def test_arguments_of_other_kinds():
    run(2, arguments)
