"""The words of torch's ``fully_shard``: served with torch's meaning, or refused with the fix."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardwise
from models import PRESETS, Block, adamw, assert_close, assert_same, batch, loss_of, make, rank, whole, world
from ranks import run
from shardwise import fsdp
from shardwise.engine.hooks import engine_of
from shardwise.errors import ConfigError, LeftOut, ReleasedParameterError, ShardwiseError, StrategyError, UnitError


# --- a script, with torch's functions and with ours -------------------------------------------------------------------
def script(words: Any) -> dict[str, torch.Tensor]:
    """What people write for FSDP2; where the names come from is the only difference."""
    model = make(odd=False)
    for block in model.blocks:
        words.fully_shard(block, reshard_after_forward=True)
    words.fully_shard([model.norm, model.head], reshard_after_forward=False)
    words.fully_shard(model, mp_policy=words.MixedPrecisionPolicy(output_dtype=torch.float64))
    assert isinstance(model, words.FSDPModule) and isinstance(model.blocks[0], words.FSDPModule)
    for first, second in zip(model.blocks, list(model.blocks)[1:], strict=False):
        first.set_modules_to_forward_prefetch([second])
        second.set_modules_to_backward_prefetch([first])
    opt = adamw(model.parameters())
    for step in range(4):
        for micro in range(2):
            model.set_reshard_after_backward(micro == 1 or step % 2 == 1)
            model.set_requires_gradient_sync(micro == 1)
            model.set_is_last_backward(micro == 1)
            if micro == 0:
                handle = model.blocks[1].unshard(async_op=True)
                if step == 1:
                    handle.wait()
            ids = batch(2 * step + micro, rank())
            logits = model(ids[:, :-1])
            assert logits.dtype == torch.float64
            F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
        opt.zero_grad()
        model.blocks[0].reshard()
    found = model.state_dict()
    return {k: (v.full_tensor() if hasattr(v, "full_tensor") else v).clone() for k, v in found.items()}


def scripts() -> None:
    import torch.distributed.fsdp as theirs

    assert_close(script(fsdp), script(theirs), 2e-5)


def test_a_script_for_fully_shard():
    run(2, scripts)


# --- arguments --------------------------------------------------------------------------------------------------------
def strategies() -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh

    def of(**kw: Any) -> str:
        return str(engine_of(shardwise.fully_shard(nn.Linear(8, 8), **kw)).strategy)

    mesh = init_device_mesh("cpu", (world(),))
    low = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    cpu = "offload_params=cpu,offload_grads=cpu,offload_optimizer=cpu"
    assert of(reshard_after_forward=None) == of(reshard_after_forward=True) == of(mesh=mesh) == "zero3"
    assert of(reshard_after_forward=False) == "zero2"
    assert of(reshard_after_forward=world()) == "zero3"
    assert of(reshard_after_forward=1) == ("zero2" if world() > 1 else "zero3")
    assert of(strategy="zero1", reshard_after_forward=False) == "zero1"
    assert of(mp_policy=low) == "zero3,param_dtype=bf16,reduce_dtype=fp32"
    assert of(mp_policy=low, strategy="zero2,param_dtype=bf16") == "zero2,param_dtype=bf16,reduce_dtype=fp32"
    assert of(mp_policy=fsdp.MixedPrecisionPolicy(), offload_policy=fsdp.OffloadPolicy()) == "zero3"
    assert of(offload_policy=fsdp.CPUOffloadPolicy(pin_memory=False)) == f"zero3,{cpu},pin_memory=false"
    assert of(offload_policy=fsdp.CPUOffloadPolicy()) == f"zero3,{cpu}"
    assert of(ignored_params=set(), shard_placement_fn=lambda p: None) == "zero3"
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"reshard_after_forward": 3}, "reshard_after_forward=3(.|\n)*hsdp"),
        ({"reshard_after_forward": "yes"}, "reshard_after_forward='yes'"),
        ({"reshard_after_forward": True, "strategy": "zero2"}, "contradicts"),
        ({"reshard_after_forward": False, "strategy": "zero3"}, "contradicts"),
        ({"mp_policy": object()}, "mp_policy"),
        ({"mp_policy": fsdp.MixedPrecisionPolicy(param_dtype=torch.float64)}, "param_dtype=torch.float64"),
        ({"mp_policy": low, "strategy": "zero3,param_dtype=fp16"}, "say it once"),
        (
            {"mp_policy": fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, cast_forward_inputs=False)},
            "cast_forward_inputs",
        ),
        ({"offload_policy": 3}, "offload_policy"),
        ({"ignored_params": [3]}, "ignored_params has a int"),
        ({"shard_placement_fn": lambda p: 0}, "layout=tensor"),
        ({"dp_mesh_dims": 3}, "dp_mesh_dims"),
    ]
    for kw, match in wrong:
        with pytest.raises((StrategyError, ConfigError), match=match):
            of(**kw)
    for nothing in ([], [3], 3, None):
        with pytest.raises(UnitError, match="fully_shard got"):
            shardwise.fully_shard(nothing)


@pytest.mark.parametrize("size", [1, 2])
def test_arguments(size):
    run(size, strategies)


def lists() -> None:
    plain, ours = make(), make()
    given = [ours.embed, ours.blocks[0], ours.blocks[0].up]  # the last is inside the one before
    assert shardwise.fully_shard(given, strategy="zero3") is given
    assert engine_of(ours.blocks[0].up) is None and engine_of(ours.blocks[0]) is not None
    shardwise.fully_shard(ours, strategy="zero3")
    for model in (plain, ours):
        loss_of(model, batch(0, 0)).backward()
    with shardwise.gathered(ours, grads=True):
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_a_list_of_modules():
    run(2, lists)


def ignoring(strategy: str, path: str) -> None:
    """Ignored parameters stay, on each rank its own; the others are as ever."""
    model = make(seed=rank())
    alone = [model.head.weight, model.blocks[1].gain]
    before = [p.detach().clone() for p in alone]
    shardwise.fully_shard(model, strategy=strategy, ignored_params=set(alone))
    assert all(type(p) is nn.Parameter and torch.equal(p, v) for p, v in zip(alone, before, strict=True))
    opt = adamw(model.parameters())
    loss_of(model, batch(0, rank())).backward()
    mine = [p.grad.clone() for p in alone]
    plain = make(seed=0)
    with torch.no_grad():
        plain.head.weight.copy_(before[0]), plain.blocks[1].gain.copy_(before[1])
    loss_of(plain, batch(0, rank())).backward()
    for grad, p in zip(mine, [plain.head.weight, plain.blocks[1].gain], strict=True):
        torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-6)  # not the mean
    opt.step()
    assert not torch.equal(alone[0], before[0])
    saved = whole(model)
    assert torch.equal(saved["head.weight"], alone[0])
    shardwise.checkpoint.save(path, models=[model], optimizers=[opt])
    with torch.no_grad():
        alone[0].zero_()
    shardwise.checkpoint.load(path, models=[model], optimizers=[opt])
    if rank() == 0:
        assert_same(whole(model), saved) if world() == 1 else None
    assert bool(alone[0].any())


@pytest.mark.parametrize("strategy", PRESETS)
def test_ignored_parameters(strategy, tmp_path):
    run(2, ignoring, strategy, str(tmp_path))


# --- values by hand ---------------------------------------------------------------------------------------------------
def by_hand(strategy: str) -> None:
    plain, model = make(), make()
    for block in model.blocks:
        shardwise.fully_shard(block, strategy=strategy)
    shardwise.fully_shard(model, strategy=strategy)
    split = world() > 1 and strategy == "zero3"

    def released(p: nn.Parameter) -> bool:
        try:
            p.sum()
        except ReleasedParameterError:
            return True
        return False

    first, second = model.blocks[0].up.weight, model.blocks[1].up.weight
    assert released(first) == split
    model.blocks[0].unshard()
    assert torch.equal(first, plain.blocks[0].up.weight)
    assert released(second) == split and released(model.head.weight) == split  # its own parameters only
    model.unshard()
    assert not released(model.head.weight) and released(second) == split
    model.reshard()
    assert released(model.head.weight) == split and not released(first)
    with shardwise.gathered(model):
        model.blocks[0].reshard()
        assert not released(first), "gathered() still needs it"
    assert released(first) == split
    handle = model.blocks[0].unshard(async_op=True)
    handle.wait()
    assert not released(first)
    loss_of(model, batch(0, 0)).backward()  # the forward takes over
    assert released(first) == split
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    model.blocks[0].unshard()
    opt.step()
    loss_of(plain, batch(0, 0)).backward()
    torch.optim.SGD(plain.parameters(), lr=1.0).step()
    torch.testing.assert_close(first.detach(), plain.blocks[0].up.weight.detach(), rtol=1e-5, atol=1e-6)
    model.blocks[0].reshard()
    assert released(first) == split
    fsdp.FSDPModule.unshard(model.blocks[1])
    (second * second).sum().backward()
    fsdp.FSDPModule.reshard(model.blocks[1])


@pytest.mark.parametrize("strategy", PRESETS)
def test_unshard_and_reshard(strategy):
    run(2, by_hand, strategy)


def losses_outside(strategy: str) -> None:
    """Losses on weights that are here outside of a forward, whose backward comes when they are gone."""
    plain, ours = (nn.Sequential(*(nn.Linear(32, 32) for _ in range(4))) for _ in range(2))
    ours.load_state_dict(plain.state_dict())
    shardwise.fully_shard(ours, strategy=strategy)

    def decay(module: nn.Module) -> torch.Tensor:
        w = module.weight
        return (w * w).sum() + w.pow(3).sum() + F.linear(w, w).mean() + (w.t() @ w.detach()).sum() + w.flatten()[3] ** 2

    for by_hand in (True, False):
        for model in (plain, ours):
            if by_hand and model is ours:
                ours.unshard()
            first = decay(model[1]) if by_hand else 0
            if by_hand and model is ours:
                ours.reshard()
            out = model(torch.ones(2, 32)).sum()
            second = decay(model[3])  # stays here between forward and backward
            (out + first).backward()
            second.backward()
    with shardwise.gathered(ours, grads=True):
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "hsdp,shard_size=2"])
def test_losses_on_weights_outside_of_a_forward(strategy):
    run(2, losses_outside, strategy)


def gathers(model: nn.Module) -> int:
    shardwise.reset_stats()
    loss_of(model, batch(0, 0)).backward()
    model.zero_grad()
    loss_of(model, batch(1, 0)).backward()
    model.zero_grad()
    found = shardwise.stats(model).comm.get("gather")
    return 0 if found is None else found.calls


def kept() -> None:
    model = make(layers=6)
    shardwise.fully_shard(model, strategy="zero3")
    gathers(model)
    usual = gathers(model)
    model.set_reshard_after_forward(False)
    gathers(model)
    fewer = gathers(model)
    model.set_reshard_after_backward(False)
    gathers(model)
    assert usual > fewer > gathers(model) == 0
    model.set_reshard_after_backward(True)
    model.set_reshard_after_forward(True)
    gathers(model)
    assert gathers(model) == usual
    with pytest.raises(ReleasedParameterError):
        model.blocks[0].up.weight.sum()
    with pytest.raises(StrategyError, match="reshard_after_forward=True"):
        shardwise.fully_shard(make(), strategy="zero2").set_reshard_after_forward(True)


def test_what_forward_and_backward_leave():
    run(2, kept)


# --- gradients by hand ------------------------------------------------------------------------------------------------
def syncing() -> None:
    model = make()
    shardwise.fully_shard(model.blocks[0], strategy="zero3")
    shardwise.fully_shard(model, strategy="zero3")
    model.set_requires_gradient_sync(False)
    loss_of(model, batch(0, rank())).backward()
    with pytest.raises(ShardwiseError, match="no_sync"):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    model.set_requires_gradient_sync(True)
    loss_of(model, batch(1, rank())).backward()
    shardwise.clip_grad_norm_(model, 1.0)
    with pytest.raises(UnitError, match="on the whole model"):
        model.blocks[0].set_requires_gradient_sync(False)
    with pytest.raises(UnitError, match="on the whole model"):
        model.set_requires_gradient_sync(False, recurse=False)
    with pytest.raises(StrategyError, match="neither"):
        model.set_requires_gradient_sync(1)
    model.set_requires_all_reduce(False)
    model.set_gradient_divide_factor(float(world()))
    with pytest.raises(StrategyError, match="multiply the loss"):
        model.set_gradient_divide_factor(1.5)
    for call in (
        lambda: model.set_custom_all_gather(None),
        lambda: model.set_custom_reduce_scatter(None),
        lambda: model.set_all_reduce_hook(None),
    ):
        with pytest.raises(LeftOut):
            call()
    with pytest.raises(UnitError, match="not sharded"):
        model.set_modules_to_forward_prefetch([model.blocks[1].up])


def test_gradients_by_hand():
    run(2, syncing)


def two_axes() -> None:
    model = shardwise.fully_shard(make(), strategy="hsdp,shard_size=2")
    model.set_requires_all_reduce(True)
    with pytest.raises(StrategyError, match="set_requires_gradient_sync"):
        model.set_requires_all_reduce(False)


def test_all_reduce_of_two_axes():
    run(4, two_axes)


def test_every_method_of_torchs_is_there():
    from torch.distributed import fsdp as theirs

    for name in vars(theirs.FSDPModule):
        if not name.startswith("_"):
            assert callable(getattr(fsdp.FSDPModule, name)), name
    for name in dir(theirs.FullyShardedDataParallel):
        if not name.startswith("_"):
            assert hasattr(fsdp.FullyShardedDataParallel, name), name
    for name in theirs.__all__:
        if name not in ("DataParallelMeshDims", "FlatParameter", "OptimStateKeyType", "share_comm_ctx"):
            assert getattr(fsdp, name) is not None
    for name in ("join", "no_sync", "register_comm_hook", "join_hook", "will_sync_module_buffers"):
        assert callable(getattr(fsdp.DistributedDataParallel, name))


# --- what the model is afterwards -------------------------------------------------------------------------------------
class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.reshard = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)

    def unshard(self) -> str:
        return "the model's own"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.reshard(x))

    def encode(self, x: torch.Tensor, twice: bool = False) -> torch.Tensor:
        x = F.linear(x, self.reshard.weight)  # its parameters, past any forward
        return self(x) @ self.out.weight if twice else x


def identity() -> None:
    model = Own()
    kind, layer = type(model), model.reshard
    shardwise.fully_shard(model, strategy="zero3")
    assert type(model) is kind and model.unshard() == "the model's own" and model.reshard is layer
    assert isinstance(model, fsdp.FSDPModule) and not isinstance(layer, fsdp.FSDPModule)
    assert not isinstance(nn.Linear(2, 2), fsdp.FSDPModule) and not isinstance(3, fsdp.FSDPModule)
    fsdp.FSDPModule.unshard(model)
    layer.weight.sum()
    fsdp.FSDPModule.reshard(model)
    parent = nn.Sequential(make().blocks[0], nn.Linear(13, 13))
    shardwise.fully_shard(parent[0], strategy="zero3")
    shardwise.fully_shard(parent, strategy="zero3")
    twin = copy.deepcopy(parent)
    assert isinstance(twin[0], fsdp.FSDPModule)
    for one in (parent, twin):
        one[0].unshard()
        assert one[0].unshard.__self__ is one[0]
    parent[0].reshard()
    with torch.no_grad():
        twin[0].up.weight.sum()
    with pytest.raises(ReleasedParameterError):
        parent[0].up.weight.sum()


def test_class_and_attributes_stay():
    run(2, identity)


def methods(strategy: str, adopted: bool) -> None:
    plain, ours = Own(), Own()
    ours.load_state_dict(plain.state_dict())
    fsdp.register_fsdp_forward_method(plain, "encode")  # not sharded: as it was
    if adopted:
        shardwise.fully_shard(ours, strategy=strategy)
        top = shardwise.fully_shard(nn.Sequential(ours), strategy=strategy)
    else:
        top = shardwise.fully_shard(ours, strategy=strategy, units=nn.Linear)
    if world() > 1 and strategy == "zero3":
        with pytest.raises(ReleasedParameterError):
            ours.encode(torch.ones(2, 4))
    fsdp.register_fsdp_forward_method(ours, "encode")
    with pytest.raises(UnitError, match="no method 'decode'"):
        fsdp.register_fsdp_forward_method(ours, "decode")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, top)]
    for step in range(3):
        for model in (plain, ours):
            x = torch.ones(2, 4) + step
            (model.encode(x, twice=step > 0).square().mean() + model(x).mean()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_close({k.removeprefix("0."): v for k, v in whole(top).items()}, whole(plain))
    with torch.no_grad():
        torch.testing.assert_close(ours.encode(torch.ones(2, 4)), plain.encode(torch.ones(2, 4)))
    if world() > 1 and strategy == "zero3":
        with pytest.raises(ReleasedParameterError):
            ours.out.weight.sum()


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
@pytest.mark.parametrize("adopted", [False, True])
def test_methods_that_run_as_a_forward(strategy, adopted):
    run(2, methods, strategy, adopted)


def test_units_of_blocks_run_methods(monkeypatch):
    monkeypatch.setattr(Block, "half", lambda self, x: self.up(self.norm(x)) * self.gain, raising=False)
    model = make()
    shardwise.fully_shard(model, strategy="zero3")
    fsdp.register_fsdp_forward_method(model.blocks[0], "half")
    model.blocks[0].half(torch.ones(2, 13)).sum().backward()
    assert model.blocks[0].gain.grad is not None
