"""When and how an optimizer is called: inside of backwards, one step in another, past exceptions; and what it shows."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import shardwise
from models import PRESETS, assert_close, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise.errors import OptimizerError
from test_offload import at


# --- inside of backwards ---------------------------------------------------------------------------------
def from_hooks(strategy: str) -> None:
    """Registered before or after sharding, of a parameter or a tensor, at the first step or later."""
    for when in ("before", "after", "tensor", "attached"):
        model, oracle = make(), make()
        opts = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, oracle)]
        weight = model.head.weight

        def hook(_: Any, opt: Any = opts[0]) -> None:
            opt.step()
            opt.zero_grad()

        if when == "before":
            handle = weight.register_post_accumulate_grad_hook(hook)
        shardwise.fully_shard(model, strategy=strategy)
        if when == "attached":
            shardwise.attach(opts[0])
        if when in ("after", "attached"):
            handle = weight.register_post_accumulate_grad_hook(hook)
        if when == "tensor":
            handle = weight.register_hook(hook)
        before = whole(model)
        with pytest.raises(OptimizerError, match=r"while a backward runs(.|\n)*optimizer_in_backward=True"):
            loss_of(model, batch(0, rank())).backward()
        handle.remove()
        opts[0].zero_grad()
        assert_same(whole(model), before)
        for step in range(2):
            loss_of(model, batch(step, rank())).backward()
            loss_of(oracle, torch.cat([batch(step, r) for r in range(2)])).backward()
            for opt in opts:
                opt.step()
                opt.zero_grad()
        assert_close(whole(model), whole(oracle), 2e-4)


@pytest.mark.parametrize("strategy", [*PRESETS, "hsdp,shard_size=1", "zero3,param_dtype=fp32,layout=tensor"])
def test_a_step_from_a_hook_of_autograd_is_refused(strategy):
    run(2, from_hooks, strategy)


def one_optimizer_per_parameter() -> None:
    """As torch's tutorial on optimizer steps in the backward does it."""
    model = make()
    opts = {p: torch.optim.Adam([p], foreach=False) for p in model.parameters()}
    shardwise.fully_shard(model, strategy="zero2")
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: (opts[p].step(), opts[p].zero_grad()))
    with pytest.raises(OptimizerError, match="optimizer_in_backward=True"):
        loss_of(model, batch(0, rank())).backward()


def test_one_optimizer_per_parameter_is_refused_in_hooks():
    run(2, one_optimizer_per_parameter)


# --- one step in another -----------------------------------------------------------------------------------
class Twice(torch.optim.Adam):
    """Two steps of its base in one."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        super().step()
        return loss


class Thrice(Twice):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        torch.optim.Adam.step(self)
        return loss


def nested(strategy: str, size: int, path: str) -> None:
    """With schedulers made before and after the first step, a step taken as an attribute, and closures."""
    model, oracle = make(), make()
    shardwise.fully_shard(model, strategy=at(strategy, "device", path))
    opts = [Thrice(m.parameters(), lr=0.01) for m in (model, oracle)]
    early = [lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)) for o in opts]
    late: list[Any] = []
    torch.optim.Adam([torch.nn.Parameter(torch.ones(1))])  # hooks are put around the base's step too
    for k in range(5):

        def closure(m: Any, o: Any, ids: torch.Tensor) -> Any:
            o.zero_grad()
            loss = loss_of(m, ids)
            loss.backward()
            return loss

        for m, o, ids in zip(
            (model, oracle), opts, (batch(k, rank()), torch.cat([batch(k, r) for r in range(size)])), strict=True
        ):
            if k % 2:
                assert o.step(lambda m=m, o=o, ids=ids: closure(m, o, ids)) is not None
            else:
                closure(m, o, ids)
                o.step()
            if k == 2:
                late.append(lr_scheduler.StepLR(o, 2, 0.5))
        for s in (*early, *late):
            s.step()
    assert early[0].get_last_lr() == early[1].get_last_lr()
    assert_close(whole(model), whole(oracle), 2e-3)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero3"])
def test_a_step_that_calls_its_bases(strategy, tmp_path):
    run(2, nested, strategy + ",layout=tensor", 2, str(tmp_path))


def nested_elsewhere(path: str) -> None:
    """The same where updates go unit by unit, and in the backward."""
    results = []
    for strategy in ("zero3,layout=tensor", "zero3,layout=tensor,optimizer_in_backward=true"):
        for home in ("device", "nvme"):
            model = shardwise.fully_shard(make(), strategy=at(strategy, home, path))
            opt = Thrice(model.parameters(), lr=0.01)
            shardwise.attach(opt)
            for k in range(3):
                loss_of(model, batch(k, rank())).backward()
                opt.step()
                opt.zero_grad()
            results.append(whole(model))
    for other in results[1:]:
        assert_same(other, results[0])


def test_a_step_that_calls_its_bases_unit_by_unit(tmp_path):
    run(2, nested_elsewhere, str(tmp_path))


def by_a_scaler(strategy: str) -> None:
    model, oracle = make(), make()
    shardwise.fully_shard(model, strategy=strategy)
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, oracle)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=16.0) for _ in opts]
    for k in range(3):
        scalers[0].scale(loss_of(model, batch(k, rank()))).backward()
        scalers[1].scale(loss_of(oracle, torch.cat([batch(k, r) for r in range(2)]))).backward()
        for scaler, opt in zip(scalers, opts, strict=True):
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
    assert_close(whole(model), whole(oracle), 2e-4)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_torchs_scaler_calls_step(strategy):
    run(2, by_a_scaler, strategy)


def past_its_own_step(strategy: str) -> None:
    """A ``step`` that was taken before the optimizer was known, and one that is put in its place again and again."""
    model, oracle = make(), make()
    shardwise.fully_shard(model, strategy=strategy)
    opts = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, oracle)]
    taken = [opt.step for opt in opts]
    for k in range(3):
        loss_of(model, batch(k, rank())).backward()
        loss_of(oracle, torch.cat([batch(k, r) for r in range(2)])).backward()
        for opt, step in zip(opts, taken, strict=True):
            opt.step = step
            opt.step()
            opt.zero_grad()
    assert_close(whole(model), whole(oracle), 2e-4)


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_a_step_that_was_taken_before(strategy):
    run(2, past_its_own_step, strategy)


# --- what others see ---------------------------------------------------------------------------------------
def hooked(strategy: str) -> None:
    """Hooks of the script around a step see the model's parameters and gradients, whenever they were registered."""
    model, oracle = make(), make()
    shardwise.fully_shard(model, strategy=strategy)
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, oracle)]
    norms: list[list[float]] = [[], []]
    for k in range(3):
        if k == 1:
            for o, m, seen in zip(opts, (model, oracle), norms, strict=True):

                def clip(opt: Any, args: Any, kwargs: Any, m: Any = m, seen: list[float] = seen) -> None:
                    params = [p for g in opt.param_groups for p in g["params"]]
                    assert all(a is b for a, b in zip(params, m.parameters(), strict=True))
                    seen.append(float(torch.nn.utils.clip_grad_norm_(params, 0.1)))

                def after(opt: Any, args: Any, kwargs: Any, m: Any = m) -> None:
                    params = [p for g in opt.param_groups for p in g["params"]]
                    assert all(a is b for a, b in zip(params, m.parameters(), strict=True))

                o.register_step_pre_hook(clip)
                o.register_step_post_hook(after)
        loss_of(model, batch(k, rank())).backward()
        loss_of(oracle, torch.cat([batch(k, r) for r in range(2)])).backward()
        for o in opts:
            o.step()
            o.zero_grad()
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and len(norms[0]) == 2
    assert_close(whole(model), whole(oracle), 2e-4)


@pytest.mark.parametrize("strategy", PRESETS)
def test_hooks_of_the_script_see_parameters(strategy):
    run(2, hooked, strategy)


def state_by_parameter(strategy: str) -> None:
    model = shardwise.fully_shard(make(), strategy=strategy)
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    p = model.head.weight
    for k in range(3):
        loss_of(model, batch(k, rank())).backward()
        opt.step()
        opt.zero_grad()
        for look in (lambda: opt.state[p], lambda: opt.state.get(p), lambda: p in opt.state):
            with pytest.raises(OptimizerError, match=r"'head.weight'(.|\n)*shardwise.optimizer_state"):
                look()
        with pytest.raises(OptimizerError, match=r"head.weight"):
            opt.state[p] = {"step": 0}
        with shardwise.optimizer_state(opt) as state:
            assert len(state) and all(values["exp_avg"].shape == piece.shape for piece, values in state.items())
        if k == 1:  # puts another dict in its place
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert not any(isinstance(key, torch.nn.Parameter) for key in opt.state)
    buffer = io.BytesIO()
    torch.save(opt.state_dict(), buffer)
    assert pickle.loads(pickle.dumps(opt.state_dict()["param_groups"]))
    for how in (copy.deepcopy, pickle.dumps):
        with pytest.raises(OptimizerError, match="load_state_dict"):
            how(opt)


@pytest.mark.parametrize("strategy", PRESETS)
def test_state_of_a_sharded_parameter_is_not_silently_empty(strategy):
    run(2, state_by_parameter, strategy)


def through_an_accelerators_optimizer() -> None:
    accelerator = shardwise.Accelerator(cpu=True, strategy="zero2")
    model = make()
    model, opt = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01))
    accelerator.backward(loss_of(model, batch(0, rank())))
    opt.step()
    assert shardwise.attach(opt)
    with shardwise.optimizer_state(opt) as state:
        assert state is opt.optimizer.state and len(state)
    with pytest.raises(OptimizerError, match="keys are the pieces"):
        opt.state[model.head.weight]


def test_an_accelerators_optimizer_is_the_one_inside_it():
    run(2, through_an_accelerators_optimizer)


@pytest.mark.parametrize("home", ["device", "nvme"])
def test_models_and_optimizers_that_are_dropped_are_freed(home, tmp_path):
    model = shardwise.fully_shard(make(), strategy=at("zero3", home, str(tmp_path)))
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = lr_scheduler.LambdaLR(opt, lambda k: 1.0)
    for k in range(3):
        loss_of(model, batch(k, 0)).backward()
        opt.step()
        schedule.step()
        opt.zero_grad()
    gone = [weakref.ref(x) for x in (model, opt, model.head.weight)]
    whole(model)  # no update is under way any more
    del model, opt, schedule
    gc.collect()
    assert [ref() for ref in gone] == [None] * 3


def test_an_optimizer_that_is_dropped_is_freed_before_its_model():
    model = shardwise.fully_shard(make(), strategy="zero2")
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss_of(model, batch(0, 0)).backward()
    opt.step()
    gone = weakref.ref(opt)
    del opt  # no collector needed: an optimizer that is still around updates in the backward
    assert gone() is None
