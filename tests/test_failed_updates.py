"""An update that failed is remembered: nothing uses the model or the optimizer before a checkpoint is loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import shardwise
from models import PRESETS, adamw, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise import checkpoint
from shardwise.engine import elementwise
from shardwise.errors import OffloadError, OptimizerError, ShardwiseError, UpdateFailed
from slowly import in_turn
from test_offload import at

CAUSE = "no memory for a moment"


class Breaks(torch.optim.SGD):
    """Fails in its ``at``-th step, when a part of its parameters has been updated."""

    at: int | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.numel():
                    p.sub_(p.grad, alpha=group["lr"])
                    if self.at is not None:
                        self.at -= 1
                        if self.at < 0:
                            raise MemoryError(CAUSE)


class Fails:
    """Every read of a disk fails inside the block."""

    def __init__(self, model: Any) -> None:
        self.store = shardwise.engine.build.require_engine(model).units[0].home.store

    def __enter__(self) -> None:
        def fails(*_: Any) -> Any:
            raise OffloadError(CAUSE, where="the disk")

        self.patch = mock.patch.object(self.store, "read", fails)
        self.patch.start()

    def __exit__(self, *_: Any) -> None:
        self.patch.stop()


def build(strategy: str, kind: str) -> tuple[Any, Any]:
    model = shardwise.fully_shard(make(), strategy=strategy)
    opt = adamw(model.parameters()) if kind == "disk" else Breaks(model.parameters(), lr=0.1)
    if "in_backward" in strategy:
        shardwise.attach(opt)
    return model, opt


def step(model: Any, opt: Any, k: int) -> None:
    loss_of(model, batch(k, rank())).backward()
    opt.step()
    opt.zero_grad()


def fail(model: Any, opt: Any, kind: str) -> None:
    """A step that fails; where it is put off, nobody has heard of it yet."""
    if kind == "disk":
        loss_of(model, batch(2, rank())).backward()
        with Fails(model):
            try:
                opt.step()
            except OffloadError:
                return
            for unit in shardwise.engine.build.require_engine(model).units:  # its thread comes to it here
                for update in unit.updates:
                    update.drain()
    else:
        opt.at = 0 if "backward" in kind else 2  # there, ranks have to fail in the same unit
        with pytest.raises(MemoryError, match=CAUSE):
            step(model, opt, 2)
        opt.at = None


def refuses(model: Any, opt: Any, path: Path) -> None:
    uses: dict[str, Any] = {
        "forward": lambda: loss_of(model, batch(0, rank())),
        "evaluation": lambda: torch.no_grad()(loss_of)(model, batch(0, rank())),
        "state_dict": model.state_dict,
        "gathered": lambda: shardwise.gathered(model).__enter__(),
        "step": opt.step,
        "optimizer state_dict": opt.state_dict,
        "optimizer_state": lambda: shardwise.optimizer_state(opt).__enter__(),
        "save": lambda: checkpoint.save(path / "bad", models=[model], optimizers=[opt]),
        "save_model": lambda: checkpoint.save_model(model, path / "bad_model"),
    }
    for name, use in uses.items():
        with pytest.raises(ShardwiseError, match=rf"{CAUSE}(.|\n)*checkpoint") as found:
            use()
        assert "unit" in str(found.value), name
    assert not (path / "bad").exists()


def fails_and_goes_on(path: str, strategy: str, kind: str, look: bool) -> None:
    """With ``look``, everything that may not be used is tried before the load."""
    saved = Path(path) / "saved"
    with mock.patch.object(elementwise, "ELEMENTWISE", {*elementwise.ELEMENTWISE, "Breaks"}):
        plain, opt = build(strategy, kind)
        for k in range(4):
            step(plain, opt, k)
        model, opt = build(strategy, kind)
        for k in range(2):
            step(model, opt, k)
        checkpoint.save(saved, models=[model], optimizers=[opt])
        fail(model, opt, kind)
        if kind == "disk" and look:
            with pytest.raises(UpdateFailed, match=CAUSE):
                model(batch(0, rank())[:, :-1])
        if look:
            refuses(model, opt, Path(path))
        checkpoint.load(saved, models=[model], optimizers=[opt])
        opt.zero_grad()
        for k in range(2, 4):
            step(model, opt, k)
        assert_same(whole(model), whole(plain))


BACKWARD = ",optimizer_in_backward=true"
NVME = ",offload_optimizer=nvme"


@pytest.mark.parametrize("look", [True, False])
@pytest.mark.parametrize("strategy", PRESETS)
def test_in_a_step(strategy, look, tmp_path):
    run(2, fails_and_goes_on, str(tmp_path), strategy, "step", look)


def first_of_all(strategy: str) -> None:
    with mock.patch.object(elementwise, "ELEMENTWISE", {*elementwise.ELEMENTWISE, "Breaks"}):
        model, opt = build(strategy, "step")
        fail(model, opt, "step")
        for _ in range(2):
            with pytest.raises(UpdateFailed, match="first step ended in an exception"):
                loss_of(model, batch(0, 0))
        with pytest.raises(UpdateFailed):
            opt.step()
        model.load_state_dict(make().state_dict())
        loss_of(model, batch(0, 0)).backward()
        with pytest.raises(UpdateFailed):  # the model is whole again, its optimizer is not
            opt.step()
        opt = Breaks(model.parameters(), lr=0.1)
        opt.step()


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_in_the_first_step_of_all(strategy):
    """Nobody but a later use can find out."""
    run(1, first_of_all, strategy)


@in_turn(look=[True, False], strategy=["ddp", "zero3", "zero1", "ddp,param_dtype=bf16", "zero3,offload_params=nvme"])
def test_of_what_is_on_a_disk(strategy, look, tmp_path):
    """During the next forward, and under zero1 at once."""
    run(2, fails_and_goes_on, str(tmp_path), at(strategy + NVME, "device", "") + f",nvme_path={tmp_path}", "disk", look)


@pytest.mark.parametrize("look", [True, False])
@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_in_the_backward(strategy, look, tmp_path):
    run(2, fails_and_goes_on, str(tmp_path), strategy + BACKWARD, "backward", look)


def partly(path: str) -> None:
    """A load that does not cover all of a model leaves the mark on what it has not covered."""
    with mock.patch.object(elementwise, "ELEMENTWISE", {*elementwise.ELEMENTWISE, "Breaks"}):
        model, opt = build("zero3", "step")
        step(model, opt, 0)
        saved = whole(model)
        fail(model, opt, "step")
        some = {k: v for k, v in saved.items() if not k.startswith("blocks.1")}
        model.load_state_dict(some, strict=False)
        with pytest.raises(UpdateFailed, match=CAUSE):
            loss_of(model, batch(0, 0))
        model.load_state_dict(saved)
        assert_same(whole(model), saved)
        torch.save(saved, Path(path) / "whole.pt")
        torch.save(some, Path(path) / "some.pt")
        opt = Breaks(model.parameters(), lr=0.1)
        fail(model, opt, "step")
        checkpoint.load_model(model, Path(path) / "some.pt", strict=False)
        with pytest.raises(UpdateFailed):
            loss_of(model, batch(0, 0))
        checkpoint.load_model(model, Path(path) / "whole.pt")
        assert_same(whole(model), saved)


def by_state_dicts(path: str, strategy: str, kind: str) -> None:
    with mock.patch.object(elementwise, "ELEMENTWISE", {*elementwise.ELEMENTWISE, "Breaks"}):
        plain, opt = build(strategy, kind)
        for k in range(4):
            step(plain, opt, k)
        model, opt = build(strategy, kind)
        for k in range(2):
            step(model, opt, k)
        values, state = whole(model), copy.deepcopy(opt.state_dict())
        fail(model, opt, kind)
        model.load_state_dict(values)
        with pytest.raises(UpdateFailed):
            step(model, opt, 2)
        opt.zero_grad()
        opt.load_state_dict(state)
        for k in range(2, 4):
            step(model, opt, k)
        assert_same(whole(model), whole(plain))


@pytest.mark.parametrize(
    ("strategy", "kind"), [("zero2", "step"), ("zero3" + NVME, "disk"), ("zero3" + BACKWARD, "backward")]
)
def test_state_dicts_of_both_are_a_load_too(strategy, kind, tmp_path):
    run(2, by_state_dicts, str(tmp_path), f"{strategy},nvme_path={tmp_path}" if kind == "disk" else strategy, kind)


def test_a_load_in_part_is_not_enough(tmp_path):
    run(1, partly, str(tmp_path))


def closure_fails(strategy: str) -> None:
    """What fails in a closure, or in a gradient that is not reduced, fails before anything has changed."""
    model = shardwise.fully_shard(make(), strategy=strategy)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    before = whole(model)

    def closure() -> Any:
        loss_of(model, batch(0, rank())).backward()
        raise ValueError("no data")

    for _ in range(2):
        with pytest.raises(ValueError, match="no data"):
            opt.step(closure)
        opt.zero_grad()
        with shardwise.no_sync(model):
            loss_of(model, batch(0, rank())).backward()
        with pytest.raises(ShardwiseError, match="no_sync"):
            opt.step()
        opt.zero_grad()
        assert_same(whole(model), before)
    step(model, opt, 0)


@pytest.mark.parametrize("strategy", PRESETS)
def test_what_fails_before_an_update_is_no_failed_update(strategy):
    run(2, closure_fails, strategy)


def test_state_that_a_disk_cannot_take_back(tmp_path):
    """A write that fails leaves no tensor in a buffer that is lent again."""
    model = shardwise.fully_shard(make(), strategy=at("zero3", "nvme", str(tmp_path)))
    opt = adamw(model.parameters())
    step(model, opt, 0)
    checkpoint.save(tmp_path / "saved", models=[model], optimizers=[opt])
    store = shardwise.engine.build.require_engine(model).units[0].home.store
    loss_of(model, batch(1, 0)).backward()
    with mock.patch.object(store, "write", side_effect=OffloadError(CAUSE)):
        try:
            opt.step()
            model(batch(0, 0)[:, :-1])
        except (UpdateFailed, OptimizerError, OffloadError):
            pass
    with pytest.raises(UpdateFailed, match=CAUSE):
        model(batch(0, 0)[:, :-1])
    checkpoint.load(tmp_path / "saved", models=[model], optimizers=[opt])
    opt.zero_grad()
    for k in (1, 2):
        step(model, opt, k)
    plain = shardwise.fully_shard(make(), strategy="zero3")
    other = adamw(plain.parameters())
    for k in range(3):
        step(plain, other, k)
    assert_same(whole(model), whole(plain))
