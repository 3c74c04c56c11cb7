"""``shardwise.deepspeed.zero``: models that are built a part on each rank, gathered parameters, probes, leaves."""

from __future__ import annotations

import base64
import copy
import importlib
import json
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import shardwise
import shardwise.deepspeed as deepspeed
from models import PRESETS, assert_close, assert_same, batch, loss_of, make, rank, whole, world
from ranks import run
from shardwise.deepspeed import utils, zero
from shardwise.deepspeed.hf_config import HfDeepSpeedConfig, deepspeed_config, is_deepspeed_zero3_enabled
from shardwise.deepspeed.runtime.zero import stage3, stage_1_and_2
from shardwise.deepspeed.zero.init import _lots
from shardwise.deepspeed.zero.leaf import apply_leaf_config, leaf_units, set_z3_leaf_modules
from shardwise.deepspeed.zero.probes import mark
from shardwise.engine.move import move
from shardwise.engine.parked import is_parked
from shardwise.engine.unit import unit_of
from shardwise.errors import ConfigError, LeftOut, ShardwiseError, UnitError, WriteLost
from slowly import in_turn

AVAILABLE, AWAY = zero.ZeroParamStatus.AVAILABLE, zero.ZeroParamStatus.NOT_AVAILABLE
HOMES = [None, "cpu", "nvme"]


class Part(nn.Module):
    """What constructors do: parameters computed from others, other modules' values written and read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        nn.init.normal_(self.up.weight, std=0.3)
        self.gain = nn.Parameter(torch.ones(width) * self.up.weight[0].detach().mean())
        self.register_buffer("steps", torch.linspace(0, 1, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x))) * self.gain * self.steps


class Net(nn.Module):
    def __init__(self, width: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.inp = nn.Linear(8, width)
        rates = [float(rate) for rate in torch.linspace(0, 0.1, depth)]  # values, which the meta device has not
        self.blocks = nn.ModuleList([Part(width) for _ in rates])
        self.out = nn.Linear(width, 8)
        self.tied = nn.Linear(width, 8, bias=False)
        self.tied.weight = self.out.weight
        self.copied = nn.Parameter(self.inp.weight.detach().t().clone())
        self.apply(self._draw)
        for p in self.parameters():
            if p.dim() == 2:
                with torch.no_grad():
                    p.mul_(1.5)
        self.scale = nn.Parameter(torch.tensor(2.0))
        with torch.no_grad():
            self.blocks[1].up.weight.copy_(self.blocks[0].up.weight).add_(self.blocks[2].up.weight)

    def _draw(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inp(x) + x @ self.copied
        for block in self.blocks:
            hidden = block(hidden)
        return self.tied(hidden) * self.scale + self.out(hidden)


def built(kind=Net, seed: int = 3, **kwargs):
    """The model, as ordinary code builds it, and a rank's random state after that."""
    torch.manual_seed(seed)
    model = kind(**kwargs)
    return model, torch.get_rng_state()


def builds(where, strategy):
    plain, after = built()
    with zero.Init(remote_device=where):
        model, state = built(seed=3 if rank() == 0 else 4)
    assert rank() > 0 or torch.equal(state, after)
    split = [is_parked(p) for p in model.parameters()]
    assert all(split) if world() > 1 or where == "nvme" else not any(split)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == {
        n: tuple(p.shape) for n, p in plain.named_parameters()
    }
    shardwise.fully_shard(model, strategy=strategy)
    found = whole(model)
    assert_same(found, whole(plain))
    model(torch.ones(2, 8)).sum().backward()


@in_turn(strategy=["ddp", "zero3", "zero2,param_dtype=bf16,autocast=true", "zero3,offload_params=nvme"], size=[1, 2, 3])
def test_values_are_those_of_ordinary_construction(size, strategy):
    for where in HOMES:
        run(size, builds, where, strategy)


def moves(where, strategy):
    """As 'initialize' does it: what is put aside is not brought by a move, and comes to the device unit by unit."""
    plain, _ = built()
    with zero.Init(remote_device=where):
        model, _ = built()
    device = shardwise.init("sim:0").device
    move(model, device)
    assert all(is_parked(p) for p in model.parameters()) and model.blocks[0].steps.device == device
    shardwise.fully_shard(model, strategy=strategy)
    assert_same({k: v.cpu() for k, v in whole(model).items()}, whole(plain))
    model(torch.ones(2, 8, device=device)).sum().backward()


@pytest.mark.parametrize("where", HOMES)
@pytest.mark.parametrize("strategy", ["zero3", "zero3,offload_params=cpu,offload_optimizer=cpu"])
def test_values_come_to_the_device(where, strategy):
    run(2, moves, where, strategy, device="sim")


class Wide(nn.Module):
    """16 equal layers, and a root that writes to all of them."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False) for _ in range(16)])
        self.apply(self._draw)
        for p in self.parameters():
            nn.init.normal_(p, std=0.1)

    def _draw(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Live(TorchDispatchMode):
    """The most bytes of all storages that were made inside, whatever was resized or freed meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.seen = 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.layout is torch.strided:
                storage = t.untyped_storage()
                self.seen.setdefault(
                    storage._cdata, weakref.ref(storage, lambda _, key=storage._cdata: self.seen.pop(key))
                )
        found = [storage.nbytes() for ref in list(self.seen.values()) if (storage := ref()) is not None]
        self.most = max(self.most, sum(found))
        return out


def most_live(where):
    """The most bytes of tensors that were live while the model was built, and sharded, and of one layer's."""
    with zero.Init(remote_device=where):
        Wide(width=8)  # which makes the place for what is put aside
    lot = _lots[next(key for key in _lots if key[1] == (where or "device"))]
    lot.keep = 0
    with Live() as meter:
        with zero.Init(remote_device=where):
            model = Wide()
        built = meter.most
        strategy = "zero3,offload_params=nvme" if where == "nvme" else "zero3"
        shardwise.fully_shard(model, strategy=strategy, units=nn.Linear)
    return built, meter.most, model.layers[0].weight.ds_numel * 4


@pytest.mark.parametrize(("size", "where", "layers"), [(4, None, 4), (2, None, 8), (1, "nvme", 1)])
def test_no_rank_ever_has_the_whole_model(size, where, layers):
    """Each rank's part of 16 layers, and those at work: one that is made, its broadcast, one that is written to."""
    for built, sharded, layer in run(size, most_live, where):
        assert built <= (layers + 3.1) * layer, f"{built / layer:.1f} layers"
        assert sharded <= (2 * layers + 3.1) * layer, f"{sharded / layer:.1f} layers"


def fails(_made) -> None:
    raise ValueError("inside")


def nests():
    assert not is_parked(nn.Linear(2, 2).weight)
    with zero.Init():
        with zero.Init(dtype=torch.bfloat16), zero.Init(enabled=False):
            inner = nn.Linear(2, 2)

        class Own(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.p, self.q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(0))
                self.inner = nn.Linear(3, 3)
                self.inner.bias.requires_grad_(False)

        class Sub(Own):
            def __init__(self) -> None:
                super().__init__()
                self.more = nn.Parameter(self.p.detach() * 2)

        own, sub, outer = Own(), Sub(), nn.Linear(2, 2)
        assert all(is_parked(p) for m in (inner, own, sub, outer) for p in m.parameters() if p.numel()), "at once"
        zero.shutdown_init_context()
        free = nn.Linear(2, 2)
        zero.restore_init_context()
        back = nn.Linear(2, 2)
    with zero.Init(enabled=False):
        outside = nn.Linear(2, 2)
    assert inner.weight.dtype == torch.bfloat16 and outer.weight.dtype == torch.get_default_dtype() == torch.float32
    for module in (inner, outer, own, sub, back):
        assert all(is_parked(p) for p in module.parameters() if p.numel())
        assert not hasattr(type(module).__init__, "__wrapped__")
    assert "__init_subclass__" not in vars(nn.Module)
    assert not any(is_parked(m.weight) for m in (free, outside))
    assert not sub.inner.bias.requires_grad
    assert torch.equal(sub.more, torch.full((3,), 2.0))
    with pytest.raises(ValueError, match="inside"), zero.Init():
        fails(nn.Linear(2, 2))
    assert not hasattr(nn.Linear.__init__, "__wrapped__")
    copied = copy.deepcopy(sub)
    assert torch.equal(copied.more, torch.full((3,), 2.0)) and not is_parked(copied.more)
    model = nn.Linear(4, 4)
    want = model.weight.detach().clone()
    zero.Init(module=model)
    assert is_parked(model.weight)
    assert torch.equal(model(torch.eye(4)) - model.bias, want.t()), "it runs without being sharded"


def test_blocks_nest_and_leave_classes_as_they_were():
    run(2, nests)


def loads():
    """What is loaded into a model that is split, and what it is asked for before it is sharded."""
    want = make(seed=5).state_dict()
    with zero.Init(config_dict_or_path={"zero_optimization": {"stage": 3}}):
        model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.load_state_dict(want)
    for lot in _lots.values():
        lot.settle()
    state = model.state_dict()
    assert all(is_parked(p) for p in model.parameters() if p.numel()), "nobody has looked at it yet"
    assert (state["head.weight"].shape, state["head.weight"].requires_grad) == (model.head.weight.shape, False)
    assert_same(dict(state), dict(want))
    state["head.weight"].mul_(2)
    assert torch.equal(model.head.weight, want["head.weight"] * 2), "it is a view"
    with torch.no_grad():
        model.head.weight.detach().copy_(want["head.weight"])
    del state
    for lot in _lots.values():
        lot.settle()
    late = model.norm.weight.detach()
    assert is_parked(model.norm.weight)
    shardwise.fully_shard(model)
    assert_same(whole(model), dict(want))
    loss_of(model, batch(0, rank())).backward()
    optimizer.step()
    assert not torch.equal(whole(model)["head.weight"], want["head.weight"])
    with shardwise.gathered(model):
        assert torch.equal(late, model.norm.weight)


def test_a_state_dict_is_loaded_into_parts():
    run(2, loads)


def runs_unsharded():
    """What autograd keeps for a backward is not taken from it, however little room there is."""
    plain, _ = built()
    with zero.Init():
        model, _ = built()
    for lot in _lots.values():
        lot.keep = 0
        lot.settle()
    x = torch.randn(3, 8)
    losses = [m(x).square().sum() for m in (plain, model)]
    torch.testing.assert_close(*losses)  # a parameter that was not contiguous is now
    for lot in _lots.values():
        lot.settle()
    for loss in losses:
        loss.backward()
    assert_close(
        {n: p.grad for n, p in plain.named_parameters()}, {n: p.grad for n, p in model.named_parameters()}, 1e-4
    )
    del losses, loss
    for lot in _lots.values():
        lot.settle()
    assert all(is_parked(p) for p in model.parameters())


def test_a_model_that_is_not_sharded_has_true_gradients():
    run(2, runs_unsharded)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"remote_device": "cuda"}, "remote_device='cuda'"),
        ({"zero_quantized_weights": True}, "zero_quantized"),
        ({"zero_param_parallel_group": object()}, "hsdp"),
    ],
)
def test_what_is_not_served_says_so(arguments, match):
    with pytest.raises(ConfigError, match=match):
        zero.Init(**arguments)


# --- gathered parameters ----------------------------------------------------------------------------------
def gathers(strategy):
    last = world() - 1
    model = make() if strategy == "split" else shardwise.fully_shard(make(), strategy=strategy)
    if strategy == "split":
        zero.Init(module=model)
    before = {n: p.clone() for n, p in make().named_parameters()}
    weight, bias = model.blocks[0].up.weight, model.blocks[0].up.bias
    with zero.GatheredParameters(weight):
        assert torch.equal(weight.data.detach().cpu().clone(), before["blocks.0.up.weight"].to(weight.dtype))
    with zero.GatheredParameters([weight, bias, weight], modifier_rank=last):
        if rank() == last:
            weight.data.fill_(3)
            nn.init.zeros_(bias)
        with zero.GatheredParameters(p for p in model.blocks[0].parameters()):
            assert tuple(bias.shape) == (39,)
    with zero.GatheredParameters(list(model.parameters()), modifier_rank=None):
        assert bool((weight == 3).all()) and bool((bias == 0).all())
        assert torch.equal(model.head.weight, before["head.weight"].to(weight.dtype))
    with pytest.raises(ValueError, match="inside"), zero.GatheredParameters(weight, modifier_rank=0):
        fails(weight.data.fill_(9))
    with zero.GatheredParameters(weight):
        assert bool((weight == (9 if strategy == "split" and world() == 1 else 3)).all())
    if world() > 1 and strategy in ("zero3", "split"):
        with pytest.raises(WriteLost, match="read"), zero.GatheredParameters(weight):
            weight.data.fill_(7)
        with zero.GatheredParameters(weight):
            assert bool((weight == 3).all())
    with zero.GatheredParameters(nn.Linear(2, 2).parameters(), modifier_rank=0), zero.GatheredParameters([]):
        pass
    with zero.GatheredParameters(weight, enabled=False):
        assert (weight.ds_status if hasattr(weight, "ds_id") else AVAILABLE) is (
            AWAY if strategy == "split" and world() > 1 else AVAILABLE
        )
    with pytest.raises(ShardwiseError, match="int"):
        zero.GatheredParameters([1])
    with pytest.raises(ShardwiseError, match=f"modifier_rank={world()}"):
        zero.GatheredParameters(weight, modifier_rank=world())
    with pytest.raises(ShardwiseError, match="NoneType"):
        zero.GatheredParameters(None)


@pytest.mark.parametrize("strategy", [*PRESETS, "zero3,param_dtype=bf16,offload_params=nvme", "split"])
@pytest.mark.parametrize("size", [1, 2])
def test_gathered_parameters(size, strategy):
    run(size, gathers, strategy)


class Shares(nn.Module):
    """A module that uses another one's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        with zero.GatheredParameters(self.one.weight, fwd_module=self):
            hidden = x @ self.one.weight.t()
        return self.two(hidden) @ self.one.weight


def shares(strategy):
    model, plain = Shares(), Shares()
    plain.load_state_dict(model.state_dict())
    shardwise.fully_shard(model, strategy=strategy, units=nn.Linear)
    for m in (model, plain):
        m(torch.ones(2, 4)).square().sum().backward()
    with shardwise.gathered(model, grads=True):
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad)
    zero.unregister_external_parameter(model, model.one.weight)
    for call in (zero.unregister_external_parameter, lambda m, p: zero.register_external_parameter(p, m)):
        with pytest.raises(ShardwiseError):
            call(model, model.one.weight)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_another_modules_parameter_is_there_in_a_forward(strategy):
    run(2, shares, strategy)


# --- probes -----------------------------------------------------------------------------------------------
def maybe_zero_3(param):
    """As trl, peft and OpenRLHF collect what they save."""
    if hasattr(param, "ds_id"):
        assert param.ds_status == AWAY
        with zero.GatheredParameters([param]):
            assert param.ds_status is AVAILABLE
            return param.data.detach().cpu().clone()
    return param.detach().cpu().clone()


def probed(strategy, kwargs):
    with zero.Init():
        split = make(**kwargs)
    assert all(p.ds_status is (AWAY if world() > 1 else AVAILABLE) for p in split.parameters() if p.numel())
    model = shardwise.fully_shard(split, strategy=strategy)
    optimizer = torch.optim.AdamW(model.parameters())
    mark(model)
    asked = [hasattr(p, "ds_id") for p in model.parameters()]
    assert all(asked) if strategy.startswith("zero3") else not any(asked)
    names = [name for name in dir(model.head.weight) if name.startswith("ds_") and hasattr(model.head.weight, name)]
    assert bool(names) == strategy.startswith("zero3")
    found = {name: maybe_zero_3(p) for name, p in model.named_parameters() if world() > 1}
    assert all(torch.equal(found[n], p.to(found[n].dtype)) for n, p in make(**kwargs).named_parameters() if n in found)
    for p in model.parameters():
        if hasattr(p, "ds_id"):
            assert (p.ds_shape, p.ds_numel) == (p.shape, p.numel())
            p.ds_active_sub_modules.clear()  # trl
            assert torch.equal(p.ds_tensor.float(), utils.safe_get_local_fp32_param(p)) and p.ds_tensor.dim() == 1
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda m, a: seen.append(m.up.weight.ds_status))
    if strategy.startswith("zero3"):
        loss_of(model, batch(0, rank())).backward()
        optimizer.step()
        assert seen == [AVAILABLE]
        twin = copy.deepcopy(model)
        assert twin.head.weight.ds_status is model.head.weight.ds_status
        assert len({p.ds_id for p in model.parameters()}) == len(list(model.parameters()))
        return {n: (p.ds_tensor.numel(), p.numel()) for n, p in model.named_parameters()}
    return None


def parts(strategy):
    model = shardwise.fully_shard(make(), strategy=strategy)
    mark(model)
    for p in model.parameters():
        assert torch.equal(p.ds_tensor, utils.safe_get_local_fp32_param(p))
    return sum(p.ds_tensor.numel() for p in model.parameters()), sum(p.ds_numel for p in model.parameters())


@pytest.mark.parametrize("strategy", ["hsdp,shard_size=2", "zero3,layout=tensor"])
def test_parts_of_several_shards_and_of_whole_tensors(strategy):
    found = run(4, parts, strategy)
    copies = 2 if strategy.startswith("hsdp") else 1
    assert sum(part for part, _ in found) == copies * found[0][1]


@pytest.mark.parametrize("strategy", [*PRESETS, "zero3,param_dtype=bf16"])
@pytest.mark.parametrize("size", [1, 2])
def test_probes_of_other_libraries(size, strategy):
    found = run(size, probed, strategy, {"tied": True})
    if found[0] is not None:
        for name, (_, numel) in found[0].items():
            assert sum(part[name][0] for part in found) == numel


# --- leaves -------------------------------------------------------------------------------------------------
class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(4))

    def forward(self, x):
        return x + self.experts[int(x.sum() > 0)](x)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.moe, self.blocks = nn.Linear(8, 8), Experts(), nn.ModuleList(Expert() for _ in range(2))

    def forward(self, x):
        x = self.moe(self.first(x))
        for block in self.blocks:
            x = block(x)
        return x


def unit_names(model):
    return {unit.name for p in model.parameters() if (unit := unit_of(p)) is not None}


def leaves(strategy):
    model, plain = Layers(), Layers()
    plain.load_state_dict(model.state_dict())
    assert leaf_units(model) is None
    assert set_z3_leaf_modules(model, [Experts]) == [model.moe] == utils.get_z3_leaf_modules(model)
    shardwise.fully_shard(model, strategy=strategy, units=leaf_units(model))
    names = unit_names(model)
    assert "moe" in names and not any(name.startswith("moe.") for name in names) and "blocks.0" in names
    assert utils.z3_leaf_module(model.moe) and utils.z3_leaf_parameter(model.moe.experts[0].up.weight)
    assert not utils.z3_leaf_parameter(model.first.weight)
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), plain(x))
    model(x).sum().backward()
    with pytest.raises(UnitError, match="already"):
        utils.set_z3_leaf_module(model.moe.experts[0], True)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_leaf_is_one_unit(strategy):
    run(2, leaves, strategy)


class ByRank(nn.Module):
    """Each rank runs another part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.parts = nn.Linear(8, 8), nn.ModuleList(Expert() for _ in range(2))

    def forward(self, x):
        return self.parts[rank()](self.first(x)).square().sum()


def by_rank(kinds):
    torch.manual_seed(0)
    model = ByRank()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    leaf = model if kinds is ByRank else model.parts
    assert set_z3_leaf_modules(model, [kinds]) == [leaf]
    engine, *_ = deepspeed.initialize(model=model, config=config)
    assert utils.z3_leaf_parameter(model.parts[0].up.weight)
    assert utils.z3_leaf_parameter(model.first.weight) == (kinds is ByRank)
    for step in range(2):
        engine.backward(engine(torch.full((2, 8), step + 1.0)))
        engine.step()
    return whole(model)


def test_leaves_whose_parts_run_on_some_ranks():
    torch.manual_seed(0)
    plain = ByRank()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for step in range(2):
        for part in plain.parts:
            (part(plain.first(torch.full((2, 8), step + 1.0))).square().sum() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for kinds in (nn.ModuleList, ByRank):
        for found in run(2, by_rank, kinds):
            assert_close(found, whole(plain))


def test_leaves_by_name():
    model = Layers()
    assert utils.set_z3_leaf_modules(model, ["Experts"]) == [model.moe]
    assert utils.unset_z3_leaf_modules(model, [f"{__name__}.Experts"]) == [model.moe]
    assert utils.get_z3_leaf_modules(model) == []
    assert utils.set_z3_leaf_modules_by_name(model, ["moe", "other"], raise_if_not_found=False) == (
        [model.moe], ["other"],
    )  # fmt: skip
    assert utils.set_z3_leaf_modules_by_suffix(model, [".0"])[0] == [model.moe.experts[0], model.blocks[0]]
    chosen = leaf_units(model)
    assert {n for n, m in model.named_modules() if id(m) in chosen} == {"moe", "blocks.0", "blocks.1"}
    for call in (
        lambda: utils.set_z3_leaf_modules(model, ["Expertz"]),
        lambda: utils.set_z3_leaf_modules(model, [3]),
        lambda: utils.set_z3_leaf_modules_by_name(model, ["nobody"]),
    ):
        with pytest.raises(UnitError):
            call()
    other = Layers()
    assert apply_leaf_config(other, {"classes": ["Experts"], "names": ["first"]}) == [other.moe, other.first]
    assert apply_leaf_config(other, None) == []


# --- estimates and configurations -----------------------------------------------------------------------------
def test_estimates_are_the_formula():
    total, largest = 10_000_000, 1_000_000
    host, device, layer = stage3.estimate_zero3_model_states_mem_needs(
        total, largest, num_gpus_per_node=4, num_nodes=2, cpu_offload=False
    )
    # bf16 and fp32 master values, gradients, two moments, over 8 ranks; two units of values and gradients on the way.
    assert device == (4 + 4 + 8) * total // 8 + 2 * 2 * largest + 2 * 4 * largest
    assert layer == 2 * largest
    assert stage3.estimate_zero3_model_states_mem_needs(total, largest, 4, 2)[1] < device
    assert (
        host < 4 * total * 4 <= stage3.estimate_zero3_model_states_mem_needs(total, largest, 4, 2, zero_init=False)[0]
    )
    cpu, whole_values = stage_1_and_2.estimate_zero2_model_states_mem_needs(total, 4, 2, cpu_offload=True)
    assert whole_values >= 2 * total and cpu >= (4 + 8) * total // 2


def test_estimates_are_shown(capsys):
    with torch.device("meta"):
        model = Wide()
    stage3.estimate_zero3_model_states_mem_needs_all_live(model, num_gpus_per_node=8, num_nodes=1)
    out = capsys.readouterr().out
    assert out.count("offload_optimizer=") == 6 and "1.0M parameters" in out and "1 x 8 devices" in out
    stage3.estimate_zero3_model_states_mem_needs_all_cold(int(7e9), int(2e8))
    stage_1_and_2.estimate_zero2_model_states_mem_needs_all_live(model)
    stage_1_and_2.estimate_zero2_model_states_mem_needs_all_cold(int(7e9))
    assert capsys.readouterr().out.count("\n") == 9 + 5 + 5


def test_the_live_configuration_is_asked(tmp_path):
    assert not is_deepspeed_zero3_enabled()
    config = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}, "fp16": {"enabled": False}}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    text = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
    for given in (config, str(path), path, text, json.dumps(config)):
        held = HfDeepSpeedConfig(given)
        assert held.config == config and is_deepspeed_zero3_enabled() and deepspeed_config() == config
        assert held.is_offload() and not held.is_zero2()
        assert held.is_false("fp16.enabled") and not held.is_true("bf16.enabled")
    held.del_config_sub_tree("zero_optimization.offload_param")
    assert not held.is_offload() and held.get_value("zero_optimization.stage") == 3 and "offload_param" in str(config)
    with pytest.raises(ConfigError, match="no such"):
        held.del_config_sub_tree("no such.key", must_exist=True)
    with pytest.raises(ConfigError, match="no DeepSpeed configuration"):
        HfDeepSpeedConfig("nowhere.json")
    del held
    assert not is_deepspeed_zero3_enabled() and deepspeed_config() is None


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("runtime.zero.partition_parameters", "ZeroParamStatus ZeroParamType Init GatheredParameters"),
        ("runtime.zero.stage3", "estimate_zero3_model_states_mem_needs_all_live unwrap_model_for_generation"),
        ("runtime.zero.stage_1_and_2", "estimate_zero2_model_states_mem_needs_all_live"),
        ("runtime.zero.config", "ZeroStageEnum"),
        ("runtime.zero.offload_config", "OffloadDeviceEnum OffloadStateTypeEnum"),
        ("runtime.zero", "Init GatheredParameters register_external_parameter ZeroParamStatus stage3"),
        ("runtime.utils", "see_memory_usage clip_grad_norm_"),
        ("runtime.activation_checkpointing", "checkpointing"),
        ("runtime.activation_checkpointing.checkpointing", "checkpoint configure reset is_configured"),
        ("accelerator", "get_accelerator"),
        ("profiling", "flops_profiler"),
        ("utils.tensor_fragment", "safe_get_full_grad safe_set_full_fp32_param"),
        ("utils.z3_leaf_module", "set_z3_leaf_modules z3_leaf_module"),
        ("utils.groups", "_get_data_parallel_world_size"),
        ("utils.logging", "logger log_dist"),
        ("utils", " ".join(utils.__all__)),
        ("zero", " ".join(zero.__all__)),
    ],
)
def test_where_other_libraries_import_names_from(module, names):
    found = importlib.import_module(f"shardwise.deepspeed.{module}")
    for name in names.split():
        assert getattr(found, name) is not None
    with pytest.raises(AttributeError):
        found.no_such_name  # noqa: B018


# --- transformers --------------------------------------------------------------------------------------------
def pretrained(folder):
    """With ``shardwise.deepspeed`` in the place of ``deepspeed``, as transformers builds and loads a model under it."""
    transformers = pytest.importorskip("transformers")
    import shardwise.deepspeed
    import shardwise.deepspeed.accelerator
    import shardwise.deepspeed.runtime.zero.partition_parameters

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    plain = transformers.LlamaForCausalLM(config)
    if rank() == 0:
        plain.save_pretrained(folder)
    torch.distributed.barrier()
    sys.modules["deepspeed"] = shardwise.deepspeed
    try:
        held = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
        assert transformers.integrations.is_deepspeed_zero3_enabled()
        model = transformers.LlamaForCausalLM.from_pretrained(folder)
        del held
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "deepspeed"]:
            del sys.modules[name]
    assert not transformers.integrations.is_deepspeed_zero3_enabled()
    assert all(is_parked(p) for p in model.parameters())
    assert model.num_parameters() == plain.num_parameters()
    shardwise.fully_shard(model)
    return whole(model), whole(plain)


def test_transformers_loads_a_model_in_parts(tmp_path):
    (model, plain), (other, _) = run(2, pretrained, str(tmp_path))
    assert_same(model, plain)
    assert_same(other, plain)


def test_what_is_left_out_says_so():
    with pytest.raises(ImportError, match=r"tp_model_init.*left out(.|\n)*tensor.parallel"):
        from shardwise.deepspeed import tp_model_init  # noqa: F401
    from shardwise.deepspeed import zero
    from shardwise.deepspeed.moe.layer import MoE

    assert not hasattr(zero, "TiledLinear") and not hasattr(zero, "nothing")
    assert not isinstance(nn.Linear(2, 2), MoE)
    with pytest.raises(LeftOut, match=r"'MoE'.*left out(.|\n)*set_z3_leaf_modules"):
        MoE(4, nn.Linear(4, 4))
