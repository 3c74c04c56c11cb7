"""The words of torch's wrappers, FSDP and DDP: served with torch's meaning, or refused with the fix."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardwise
from models import Block, adamw, assert_close, assert_same, batch, loss_of, make, rank, whole, world
from ranks import run
from shardwise import checkpoint, device, fsdp
from shardwise.engine.hooks import engine_of
from shardwise.errors import ConfigError, DeviceError, LeftOut, OptimizerError, StrategyError, UnitError
from shardwise.fsdp import DistributedDataParallel as DDP
from shardwise.fsdp import FullyShardedDataParallel as FSDP


def units_of(model: nn.Module) -> set[str]:
    return {u.name for u in engine_of(model).units if u.slots}


def constructor() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import wrap

    kinds = fsdp.ShardingStrategy
    mesh = init_device_mesh("cpu", (world(),))
    cpu = "offload_params=cpu,offload_grads=cpu,offload_optimizer=cpu"
    low = fsdp.MixedPrecision(torch.bfloat16, torch.float32)
    policy = functools.partial(wrap.transformer_auto_wrap_policy, transformer_layer_cls={Block})
    taken: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((), {}, "zero3"),
        ((None, kinds.FULL_SHARD, fsdp.CPUOffload(False), policy), {}, "zero3"),
        ((dist.group.WORLD, kinds.SHARD_GRAD_OP), {}, "zero2"),
        ((), {"sharding_strategy": kinds.NO_SHARD}, "ddp"),
        ((), {"sharding_strategy": kinds.HYBRID_SHARD, "device_mesh": mesh}, "hsdp"),
        ((), {"cpu_offload": fsdp.CPUOffload(offload_params=True)}, f"zero3,{cpu}"),
        ((), {"mixed_precision": low, "device_id": torch.device("cpu")}, "zero3,param_dtype=bf16,reduce_dtype=fp32"),
        ((), {"backward_prefetch": fsdp.BackwardPrefetch.BACKWARD_POST, "limit_all_gathers": False}, "zero3"),
        ((), {"strategy": "zero1", "sync_module_states": True, "forward_prefetch": True}, "zero1"),
    ]
    for args, kw, expected in taken:
        assert str(engine_of(FSDP(make(), *args, **kw)).strategy) == expected
    blocks = {f"blocks.{k}" for k in range(3)} | {""}
    assert units_of(FSDP(make(), auto_wrap_policy=policy)) == blocks
    assert units_of(FSDP(make(), auto_wrap_policy=wrap.ModuleWrapPolicy({Block}))) == blocks
    small = functools.partial(wrap.size_based_auto_wrap_policy, min_num_params=10**9)
    assert units_of(FSDP(make(), auto_wrap_policy=small)) >= blocks, "it chooses nothing: our own choice"
    with pytest.warns(UserWarning, match="buffer_dtype"):
        FSDP(make(), mixed_precision=fsdp.MixedPrecision(torch.bfloat16, buffer_dtype=torch.bfloat16))
    refused: list[tuple[dict[str, Any], str]] = [
        ({"sharding_strategy": kinds._HYBRID_SHARD_ZERO2}, "HYBRID_SHARD"),
        ({"sharding_strategy": "HALF"}, "HALF"),
        ({"sharding_strategy": kinds.FULL_SHARD, "strategy": "zero3"}, "say it once"),
        ({"auto_wrap_policy": policy, "units": Block}, "say it once"),
        ({"auto_wrap_policy": 3}, "auto_wrap_policy"),
        ({"mixed_precision": object()}, "mixed_precision"),
        ({"cpu_offload": 3}, "cpu_offload"),
        ({"process_group": (1, 2)}, "process_group"),
        ({"ignored_modules": [3]}, "ignored_modules has a int"),
        ({"nonsense": 1}, "nonsense"),
    ]
    for kw, match in refused:
        with pytest.raises((StrategyError, ConfigError), match=match):
            FSDP(make(), **kw)
    if device.accelerator() is None:
        with pytest.raises(DeviceError, match="cuda:0 was asked for"):
            FSDP(make(), device_id=0)


def test_constructor():
    run(2, constructor)


def one_rank_group() -> None:
    group = dist.new_group([0])
    if rank() == 0:
        with pytest.raises(StrategyError, match="process_group"):
            FSDP(make(), group)


def test_a_group_of_some_ranks_is_refused():
    run(2, one_rank_group)


def ignoring() -> None:
    model = make(seed=rank())
    head = model.head.weight.detach().clone()
    wrapped = FSDP(model, ignored_modules=[model.head], ignored_states=[model.blocks[1].gain])
    assert torch.equal(model.head.weight, head) and type(model.blocks[1].gain) is nn.Parameter
    loss_of(wrapped, batch(0, rank())).backward()
    assert type(model.head.weight.grad) is torch.Tensor


def test_ignored_modules_and_states():
    run(2, ignoring)


def nested(F: Any, m: nn.Module, **kw: Any) -> nn.Module:
    for i, block in enumerate(m.blocks):
        m.blocks[i] = F(block, **kw)
    m.head = F(m.head, **kw)
    return F(m, **kw)


def same_script() -> None:
    """Nested wrappers, accumulation, state dicts of rank 0, summoning: with torch's class and with ours."""
    from torch.distributed import fsdp as theirs

    states, values = [], []
    for F, words, kw in (
        (theirs.FullyShardedDataParallel, theirs, {"use_orig_params": True, "device_id": torch.device("cpu")}),
        (FSDP, fsdp, {"use_orig_params": True}),
    ):
        model = nested(F, make(odd=False), **kw)
        assert len(F.fsdp_modules(model)) == 5 and isinstance(model.module.blocks[0], F)
        opt = adamw(model.parameters())
        for step in range(3):
            with model.no_sync():
                loss_of(model, batch(2 * step, rank())).backward()
            loss_of(model, batch(2 * step + 1, rank())).backward()
            model.clip_grad_norm_(0.5)
            opt.step()
            opt.zero_grad()
        loss_of(model, batch(9, rank())).backward()
        with F.summon_full_params(model, True, False, with_grads=True):
            values.append({n: (p.detach().clone(), p.grad.clone()) for n, p in model.named_parameters()})
        config = words.FullStateDictConfig(rank0_only=F is FSDP)  # torch's crashes so on a CPU
        with F.state_dict_type(model, words.StateDictType.FULL_STATE_DICT, config):
            states.append({k: v.clone() for k, v in model.state_dict().items()})
    assert bool(states[1]) == (rank() == 0)
    if rank() == 0:
        assert_close(states[1], states[0], 2e-5)
    assert values[0].keys() == values[1].keys()
    for name, (value, grad) in values[0].items():
        torch.testing.assert_close(values[1][name][0], value, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(values[1][name][1], grad, rtol=2e-5, atol=2e-5)


def test_a_script_for_fsdp():
    run(2, same_script)


def names(path: str) -> None:
    """State dicts, checkpoints and loads speak the module's own names, however it is wrapped."""
    plain = make()
    wrapped = nested(FSDP, make())
    assert list(wrapped.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in wrapped.named_parameters()] == [n for n, _ in plain.named_parameters()]
    other = make(seed=5)
    wrapped.load_state_dict(other.state_dict())
    assert_same(whole(wrapped), whole(other))
    wrapped.load_state_dict({f"module.{k}": v for k, v in plain.state_dict().items()})
    assert_same(whole(wrapped), whole(plain))
    around = nn.Sequential(nested(FSDP, make()))
    around.load_state_dict({f"0.{k}": v for k, v in other.state_dict().items()})
    assert_same(whole(around[0]), whole(other))
    missing = wrapped.load_state_dict({"no_such": torch.zeros(1)}, strict=False)
    assert missing.unexpected_keys == ["no_such"]
    opt = adamw(wrapped.parameters())
    loss_of(wrapped, batch(0, rank())).backward()
    opt.step()
    checkpoint.save(f"{path}/run", models=[wrapped], optimizers=[opt])
    checkpoint.save_model(wrapped, f"{path}/model")
    expected = whole(wrapped)
    flat = shardwise.fully_shard(make(seed=7), strategy="zero2")
    checkpoint.load(f"{path}/run", models=[flat], optimizers=[adamw(flat.parameters())])
    assert_same(whole(flat), expected)
    again = nested(FSDP, make(seed=8))
    checkpoint.load_model(again, f"{path}/model")
    assert_same(whole(again), expected)
    other_ddp = DDP(make(seed=3), [rank()])
    other_ddp.load_state_dict(expected)
    assert_same(whole(other_ddp.module), expected)


@pytest.mark.parametrize("size", [1, 2])
def test_names_are_the_modules_own(size, tmp_path):
    run(size, names, str(tmp_path))


def functions() -> None:
    wrapped = FSDP(make())
    kinds = fsdp.StateDictType
    for kind in (kinds.SHARDED_STATE_DICT, kinds.LOCAL_STATE_DICT):
        with pytest.raises(LeftOut, match=r"checkpoint\.save"):
            FSDP.set_state_dict_type(wrapped, kind)
    before = FSDP.set_state_dict_type(wrapped, kinds.FULL_STATE_DICT, fsdp.FullStateDictConfig(rank0_only=True))
    assert before.state_dict_type is kinds.FULL_STATE_DICT and not before.state_dict_config.rank0_only
    assert bool(wrapped.state_dict()) == (rank() == 0)
    FSDP.set_state_dict_type(wrapped, before.state_dict_type, before.state_dict_config)
    assert wrapped.state_dict()
    opt = adamw(wrapped.parameters())
    for name in (
        "optim_state_dict", "optim_state_dict_to_load", "full_optim_state_dict", "sharded_optim_state_dict",
        "shard_full_optim_state_dict", "flatten_sharded_optim_state_dict", "scatter_full_optim_state_dict",
        "rekey_optim_state_dict",
    ):  # fmt: skip
        with pytest.raises(LeftOut, match=r"checkpoint\.save"):
            getattr(FSDP, name)(wrapped, opt)
    with pytest.raises(LeftOut, match="reduce_dtype"):
        wrapped.register_comm_hook(None, lambda state, bucket: None)
    with pytest.raises(StrategyError, match="rank0_only"):
        FSDP.summon_full_params(wrapped, writeback=True, rank0_only=True)
    with pytest.raises(UnitError, match="not sharded"):
        FSDP.summon_full_params(nn.Linear(2, 2))
    with FSDP.summon_full_params(wrapped.module.blocks[0], writeback=False, rank0_only=True, offload_to_cpu=True):
        wrapped.module.blocks[0].up.weight.sum()
    with FSDP.summon_full_params(wrapped), torch.no_grad():
        wrapped.module.head.weight.fill_(float(rank() + 3))
    assert bool((whole(wrapped)["head.weight"] == 3).all())
    wrapped.apply(lambda m: nn.init.ones_(m.weight) if isinstance(m, nn.Linear) else None)
    assert bool((whole(wrapped)["blocks.1.up.weight"] == 1).all())
    assert wrapped.check_is_root() and FSDP.fsdp_modules(nn.Sequential(wrapped), root_only=True) == [wrapped]
    wrapped.set_requires_gradient_sync(True)  # the methods of fully_shard, through the wrapper
    wrapped.unshard()
    wrapped.module.head.weight.sum()
    wrapped.reshard()


def test_functions_of_the_class():
    run(2, functions)


# --- DDP --------------------------------------------------------------------------------------------------------------
def ddp_arguments() -> None:
    from torch.distributed.device_mesh import init_device_mesh

    for args, kw in (
        (([rank()],), {}),
        (([rank()], rank()), {"find_unused_parameters": True, "bucket_cap_mb": 3}),
        ((None, None, 0, True, True, dist.group.WORLD), {"device_mesh": init_device_mesh("cpu", (world(),))}),
    ):
        ddp = DDP(make(), *args, **kw)
        assert str(engine_of(ddp).strategy) == "ddp" and ddp.module is ddp.module.requires_grad_(True)
    for kw in ({"broadcast_buffers": False}, {"forward_sync_buffers": False}):
        model = DDP(nn.BatchNorm1d(3), **kw)
        assert not engine_of(model).strategy.broadcast_buffers and not model.will_sync_module_buffers()
    assert DDP(nn.BatchNorm1d(3)).will_sync_module_buffers() and not DDP(make()).will_sync_module_buffers()
    low = DDP(make(), mixed_precision=fsdp.MixedPrecision(torch.bfloat16, torch.bfloat16))
    assert str(engine_of(low).strategy) == "ddp,param_dtype=bf16,reduce_dtype=bf16"
    for kw, match in (
        ({"device_ids": "zero2"}, "strategy='zero2'"),
        ({"delay_all_reduce_named_params": []}, "delay_all_reduce"),
        ({"process_group": object()}, "process_group"),
        ({"nonsense": 1}, "nonsense"),
    ):
        with pytest.raises(StrategyError, match=match):
            DDP(make(), **kw)
    with pytest.raises(LeftOut, match="bf16_compress_hook"):
        low.register_comm_hook(None, lambda state, bucket: None)
    with pytest.raises(LeftOut, match="join"):
        low.join_hook()


def test_arguments_of_ddp():
    run(2, ddp_arguments)


def uneven(strategy: str | None, known: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Rank ``r`` has ``2 + 2 * r`` batches."""
    kind = nn.parallel.DistributedDataParallel if strategy is None else DDP
    ddp = kind(make(odd=False)) if strategy is None else kind(make(odd=False), strategy=strategy)
    opt = torch.optim.SGD(ddp.parameters(), lr=0.1)
    if strategy is not None and known:
        shardwise.attach(opt)
    losses = []
    with ddp.join():
        for step in range(2 + 2 * rank()):
            loss = loss_of(ddp, batch(step, rank()))
            loss.backward()
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
    loss_of(ddp, batch(9, rank())).backward()  # together again
    return losses, {k: v.clone() for k, v in ddp.module.state_dict().items()}


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_join(strategy):
    theirs, ours = run(2, uneven, None, True), run(2, uneven, strategy, True)
    for (losses, state), (expected, values) in zip(ours, theirs, strict=True):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert_close(state, values, 1e-5)


def join_refusals() -> None:
    ddp = DDP(make())
    with pytest.raises(StrategyError, match="join_uneven_inputs"), ddp.join(divide_by_initial_world_size=False):
        pass
    with pytest.raises(StrategyError, match="throw_on"), ddp.join(throw_on_early_termination=True):
        pass
    with ddp.join(enable=False):
        loss_of(ddp, batch(0, rank())).backward()


def test_what_join_refuses():
    run(2, join_refusals)


def test_join_of_an_optimizer_that_nobody_knows():
    with pytest.raises(AssertionError, match=rf"{OptimizerError.__name__}(.|\n)*shardwise\.attach"):
        run(2, uneven, "zero2", False)
