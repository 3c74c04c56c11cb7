"""Activations recomputed in backward, or kept on the host: the same numbers, and less that is kept."""

from __future__ import annotations

import gc
import inspect
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardwise
from models import PRESETS, Block, adamw, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise.engine import activations
from shardwise.engine.hooks import engine_of
from shardwise.errors import OffloadError, StrategyError, UnitError
from shardwise.strategy import Strategy
from shardwise.tiers import Ledger
from shardwise.tiers.saved_tensors import SavedOnHost
from shardwise.utils import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from slowly import in_turn

D = 32
ASK = {
    "checkpointing": ",activation_checkpointing=true",
    "offload": ",activation_offload=cpu",
    "both": ",activation_checkpointing=true,activation_offload=cpu",
}


@contextmanager
def separate_memory():
    """The path of a device whose memory is not the host's, with a CPU at both ends."""
    with mock.patch.object(activations, "SavedOnHost", partial(SavedOnHost, separate=True)):
        yield


class Odd(nn.Module):
    """Dropout, a running mean, arguments by keyword and in a list, and outputs in a dict beside what is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(D, 2 * D), nn.BatchNorm1d(2 * D, affine=False), nn.Linear(2 * D, D)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.forwards = 0

    def forward(self, x: torch.Tensor, *, others: list[torch.Tensor], scale: float = 1.0) -> dict[str, Any]:
        self.forwards += 1
        self.calls = self.calls + 1  # another object, not another value
        h = F.dropout(self.norm(F.gelu(self.up(x)).float()).to(x.dtype), 0.2, self.training)
        x = x + self.down(h) * scale
        return {"x": x, "gates": (torch.tanh(x + others[0]), None), "note": "no tensor"}


class Net(nn.Module):
    """The blocks of one kind, the first one used twice, and a head that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(D, D, bias=False)
        self.blocks = nn.ModuleList(Odd() for _ in range(3))
        self.head = nn.Linear(D, D, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in [*self.blocks, self.blocks[0]]:
            out = block(x, others=[x], scale=0.5)
            assert out["note"] == "no tensor" and out["gates"][1] is None
            x = out["x"] * out["gates"][0]
        return self.head(x)


def rows(step: int, r: int, n: int = 24) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(77 * step + r))


def build(strategy: str, model: type[nn.Module] = Net, **kw: Any) -> nn.Module:
    torch.manual_seed(3)
    return shardwise.fully_shard(model(), strategy=strategy, **kw)


def story(strategy: str) -> tuple[list[float], dict[str, torch.Tensor], list[int]]:
    """Three steps, the second over two micro-batches under no_sync, with an evaluation between them."""
    model = build(strategy)
    opt = adamw(model.parameters())
    losses = []
    torch.manual_seed(rank())
    for step in range(3):
        if step == 1:
            with shardwise.no_sync(model):
                model(rows(9, rank())).square().mean().backward()
        loss = model(rows(step, rank())).square().mean()
        loss.backward()
        losses.append(loss.item())
        shardwise.clip_grad_norm_(model, 0.5)
        opt.step()
        opt.zero_grad()
        with torch.no_grad():
            losses.append(model.eval()(rows(step, 5)).sum().item())
        model.train()
    return losses, whole(model), [b.forwards for b in model.blocks]


def same_numbers(strategy: str) -> None:
    losses, weights, forwards = story(strategy)
    assert forwards == [14, 7, 7]  # 4 of training and 3 of evaluation, the first block twice in each
    for name, more in ASK.items():
        with separate_memory():
            other_losses, other_weights, others = story(strategy + more)
        assert other_losses == losses, name
        assert_same(other_weights, weights)  # running means and counters included
        assert others == ([14, 7, 7] if name == "offload" else [14 + 8, 7 + 4, 7 + 4])


@in_turn(size=[1, 2], strategy=[*PRESETS, "hsdp,shard_size=1", "zero3,param_dtype=bf16"])
def test_same_numbers_and_each_unit_runs_once_more(strategy, size):
    run(size, same_numbers, strategy)


# --- what is kept -------------------------------------------------------------------------------------
def kept_bytes(strategy: str) -> tuple[int, int]:
    """Bytes that the graph of one forward holds beside the parameters, on the device and on the host."""
    model = build(strategy, partial(make, d=D, layers=4))
    ids = batch(0, rank(), rows=8, length=16)
    loss_of(model, ids).backward()  # the order of units is learned
    with shardwise.memory_meter(model) as meter:
        before = meter.activations
        loss = loss_of(model, ids)
        here = meter.activations - before
        on_host = shardwise.stats(model).live["host_activations"]
        loss.backward()
    assert shardwise.stats(model).live["host_activations"] == 0
    return here, on_host


def less_is_kept(strategy: str) -> None:
    with separate_memory():
        plain, none = kept_bytes(strategy)
        checkpointed, still_none = kept_bytes(strategy + ASK["checkpointing"])
        offloaded, much = kept_bytes(strategy + ASK["offload"])
        both, inputs = kept_bytes(strategy + ASK["both"])
    x = 8 * 16 * D * 4  # one activation between two blocks
    # Of a block: normalised, up, gelu and down, so 1 + 3 + 3 + 1 times x at least; of these stays its input.
    assert plain - checkpointed >= 4 * 7 * x
    assert none == still_none == 0
    assert much >= plain - offloaded >= 4 * 7 * x
    assert 4 * x <= inputs <= 8 * x and checkpointed - both >= 4 * x


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_less_is_kept(strategy):
    run(2, less_is_kept, strategy)


def copies_of_views() -> None:
    """What is saved of the flat buffers is the same storage, and each other storage crosses once."""
    crossed: list[tuple[int, int]] = []

    class Watched(SavedOnHost):
        def _take(self, tensor: torch.Tensor, storage: torch.UntypedStorage, version: int) -> Any:
            crossed.append((storage._cdata, storage.nbytes()))
            return super()._take(tensor, storage, version)

    for preset in PRESETS:
        with mock.patch.object(activations, "SavedOnHost", partial(Watched, separate=True)):
            model = build(preset + ASK["offload"], partial(make, d=D, layers=3))
        engine = engine_of(model)
        flats = {b.flat.tensor.untyped_storage()._cdata for u in engine.units for b in u.buckets}
        loss = loss_of(model, batch(0, rank(), rows=8, length=16))
        assert crossed and not {c for c, _ in crossed} & flats
        # As often as there are distinct storages: x is saved by a norm and by a sum, and crosses once.
        assert len(crossed) <= 3 * 7 + 6
        for unit in engine.units[:1] if preset == "zero3" else ():
            assert not unit.here  # nothing that was saved keeps its values here
        loss.backward()
        stats = shardwise.stats(model)
        assert stats.to_host == sum(n for _, n in crossed) and stats.to_device <= stats.to_host
        assert stats.live["host_activations"] == 0 and stats.peak["host_activations"] == stats.to_host
        crossed.clear()


def test_flat_buffers_are_never_copied_and_storages_once():
    run(2, copies_of_views)


def test_nothing_moves_on_a_cpu():
    model = build("ddp" + ASK["offload"])
    model(rows(0, 0)).sum().backward()
    assert shardwise.stats(model).to_host == 0 and engine_of(model).host_activations is None


# --- the store by itself --------------------------------------------------------------------------------
class Kept:
    """Tensors that somebody else has a place for."""

    def __init__(self, storages: Any) -> None:
        self.storages = storages

    def pack(self, tensor: torch.Tensor) -> Any:
        return tensor if tensor.untyped_storage()._cdata in self.storages else None

    def unpack(self, packed: Any) -> torch.Tensor:
        return packed


def store(stays: Any = ()) -> SavedOnHost:
    return SavedOnHost(torch.device("cpu"), Ledger(), Kept(stays), separate=True)


def test_what_comes_back_is_what_was_saved():
    saved = store()
    base = torch.randn(40, 60)
    part, small = base.t()[5:50:2, 3:], torch.randn(4)
    for tensor in (base, part, torch.randn(8, 5, 9).expand(3, 8, 5, 9), torch.rand(2000) > 0.5, small):
        back = saved._unpack(saved._pack(tensor))
        assert torch.equal(back, tensor) and back.stride() == tensor.stride() and back.dtype == tensor.dtype
        assert (back.data_ptr() == tensor.data_ptr()) == (tensor is small)
    z = torch.randn(300, dtype=torch.complex64)
    assert saved._pack(z.conj()).data_ptr() == z.data_ptr()  # their values are not what is in the storage
    row = torch.randn(1000, 300)[3]
    assert saved._pack(row).data_ptr() == row.data_ptr()  # copying it would copy what somebody else keeps
    held = store({base.untyped_storage()._cdata})
    assert held._unpack(held._pack(part)).data_ptr() == part.data_ptr() and held.link.to_host_bytes == 0
    first, second = saved._pack(base), saved._pack(part)
    assert first.held is second.held
    a, b = saved._unpack(first), saved._unpack(second)
    assert a.untyped_storage()._cdata == b.untyped_storage()._cdata
    base.add_(1)
    assert saved._pack(base).held is not first.held  # other values
    assert torch.equal(saved._unpack(first) + 1, base)


def test_the_one_before_is_brought_ahead_and_dropped_with_the_graph():
    saved = store()
    tensors = [torch.randn(1000) for _ in range(4)]
    packed = [saved._pack(t) for t in tensors]
    assert saved.ledger.live["host_activations"] == 4 * 4000
    saved._unpack(packed[3])
    assert saved.link.to_device_bytes == 2 * 4000  # itself, and the one before
    assert torch.equal(saved._unpack(packed[2]), tensors[2])
    assert saved.link.to_device_bytes == 3 * 4000
    assert torch.equal(saved._unpack(packed[2]), tensors[2])  # asked for again, as a retained graph does
    assert saved.link.to_device_bytes == 4 * 4000
    packed.clear()
    assert saved.ledger.live["host_activations"] == 0


def test_a_tensor_that_is_changed_on_its_way_is_an_error():
    class Slow:
        done = False

        def wait(self) -> None: ...

    saved = store()
    with mock.patch.object(saved.link, "to_host", return_value=Slow()):
        tensor = torch.randn(1000)
        saved._pack(tensor)
        tensor.add_(1)
    with pytest.raises(OffloadError, match="changed in place"):
        saved.drain()


# --- the module -----------------------------------------------------------------------------------------
def test_modules_stay_what_they_are():
    plain = make()
    model = make()
    modules, signatures = dict(model.named_modules()), Block.forward.__code__.co_varnames[:2]
    with separate_memory():
        shardwise.fully_shard(model, strategy="zero2" + ASK["both"])
    assert dict(model.named_modules()) == modules and all(type(b) is Block for b in model.blocks)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert tuple(inspect.signature(model.blocks[0].forward).parameters) == signatures[1:]
    seen = []
    model.blocks[1].register_forward_hook(lambda m, a, out: seen.append(out.shape))
    loss_of(model, batch(0, 0)).backward()
    assert len(seen) == 1  # hooks run once per call
    with torch.no_grad(), mock.patch.object(activations, "checkpoint") as never:
        model(batch(0, 0))
    never.assert_not_called()


class Inner(nn.Module):
    def __init__(self, d: int = D) -> None:
        super().__init__()
        self.lin, self.count = nn.Linear(d, d), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return torch.tanh(self.lin(x))


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.count = Inner(), Inner(), 0
        self.gain = nn.Parameter(torch.ones(D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.aux = self.b(self.a(x)) * self.gain
        return x + self.aux


class Nest(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Outer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def nested(strategy: str) -> None:
    """Units in units, sharded one by one: the inner ones are recomputed, once. One asks for nothing."""
    results = []
    for more in ("", ASK["both"]):
        torch.manual_seed(0)
        model = Nest()
        with separate_memory():
            for i, layer in enumerate(model.layers):
                for part in (layer.a, layer.b):
                    shardwise.fully_shard(part, strategy=strategy + (more if i else ""))
                shardwise.fully_shard(layer, strategy=strategy + more)
            shardwise.fully_shard(model, strategy=strategy)
        for step in range(2):
            # An auxiliary loss on the module, of the first layer: backward has not passed its output.
            (model(rows(step, rank())).square().mean() + model.layers[0].aux.square().mean()).backward()
        counts = [(m.count, m.a.count, m.b.count) for m in model.layers]
        assert counts == ([(4, 4, 4), (2, 4, 4)] if more else [(2, 2, 2)] * 2)
        if more:
            assert shardwise.stats(model).to_host > 0
        with shardwise.gathered(model, grads=True):
            results.append({n: p.grad.clone() for n, p in model.named_parameters()})
    assert_same(*results)


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_units_in_units_and_strategies_of_their_own(strategy):
    run(2, nested, strategy)


class Watching(nn.Module):
    """What a unit leaves on the module is all of the loss: no gradient comes to the output of a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Outer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            layer(x)
        return torch.stack([layer.aux.square().mean() for layer in self.layers]).sum()


def only_aux(strategy: str) -> Any:
    model = build(strategy, Watching)
    model(rows(0, rank())).backward()
    with shardwise.gathered(model, grads=True):
        return {n: p.grad.clone() for n, p in model.named_parameters()}


def test_backward_that_begins_inside_a_unit():
    plain = run(2, only_aux, "ddp")
    for found, expected in zip(run(2, only_aux, "zero3" + ASK["checkpointing"]), plain, strict=True):
        assert_same(found, expected)


def twice_differentiated(strategy: str) -> Any:
    model = build(strategy, Nest)
    x = rows(0, rank()).requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
    slope.square().sum().backward()
    with shardwise.gathered(model, grads=True):
        return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_create_graph(strategy):
    plain = run(2, twice_differentiated, strategy)
    for more in ASK.values():
        for found, expected in zip(run(2, separately, twice_differentiated, strategy + more), plain, strict=True):
            assert_same(found, expected)


def separately(function: Any, *args: Any) -> Any:
    with separate_memory():
        return function(*args)


def frozen_and_autocast(strategy: str) -> Any:
    torch.manual_seed(3)
    model = make(d=D, layers=3)
    model.embed.requires_grad_(False)
    model.blocks[1].up.requires_grad_(False)
    shardwise.fully_shard(model, strategy=strategy)
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch(step, rank(), rows=8, length=16))
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses, whole(model)


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_frozen_parameters_and_autocast(strategy):
    plain = run(2, frozen_and_autocast, strategy)
    for more in ASK.values():
        for (losses, state), expected in zip(
            run(2, separately, frozen_and_autocast, strategy + more), plain, strict=True
        ):
            assert losses == expected[0]
            assert_same(state, expected[1])


def compiled(strategy: str) -> Any:
    torch._dynamo.reset()
    torch.manual_seed(3)
    model = make(d=D, layers=2)
    for block in model.blocks:
        block.compile(backend="aot_eager")
    shardwise.fully_shard(model, strategy=strategy, units=Block)
    losses = []
    for step in range(2):
        loss = loss_of(model, batch(step, rank(), rows=8, length=16))
        loss.backward()
        losses.append(loss.item())
    with shardwise.gathered(model, grads=True):
        return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_compiled_units():
    plain = compiled("zero3")
    for more in ASK.values():
        losses, grads = separately(compiled, "zero3" + more)
        assert losses == plain[0]
        assert_same(grads, plain[1])


def test_a_dropped_model_and_a_dropped_graph_leave_nothing():
    with separate_memory():
        model = build("zero3" + ASK["both"])
    engine = engine_of(model)
    out = model(rows(0, 0))
    assert engine.ledger.live["host_activations"] > 0
    del out
    gc.collect()
    assert engine.ledger.live["host_activations"] == 0


# --- errors ---------------------------------------------------------------------------------------------
def test_the_strategy_says_it():
    strategy = Strategy.parse("zero3" + ASK["both"])
    assert strategy == Strategy("zero3", activation_checkpointing=True, activation_offload="cpu")
    assert Strategy.parse(str(strategy)) == strategy
    assert "computed again" in strategy.explain() and "host memory" in strategy.explain()
    for bad in ("activation_offload=nvme", "activation_offload=disk", "activation_checkpointing=often"):
        with pytest.raises(StrategyError, match=bad.partition("=")[0]):
            Strategy.parse(f"zero3,{bad}")
    with pytest.raises(StrategyError, match="activation_checkpointing"):
        Strategy("zero3", activation_checkpointing="yes")


def test_nothing_to_recompute_is_an_error_where_it_is_known():
    model = shardwise.fully_shard(Inner(), strategy="ddp" + ASK["checkpointing"])
    with torch.no_grad():
        model(rows(0, 0))
    with pytest.raises(UnitError, match="units=Block"):
        model(rows(0, 0))


class Cached(Inner):
    def forward(self, x: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
        return super().forward(x)


class KeysAndValues:
    def get_seq_length(self) -> int:
        return 0


class WithCache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Cached() for _ in range(2))
        self.by_name = True

    def forward(self, x: torch.Tensor, cache: Any = None) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x, past_key_values=cache) if self.by_name else layer(x, cache)
        return x


def test_what_cannot_be_recomputed_says_so():
    model = build("ddp" + ASK["checkpointing"], WithCache)
    model(rows(0, 0)).sum().backward()
    with pytest.raises(UnitError, match=r"'past_key_values' is a cache(.|\n)*use_cache=False"):
        model(rows(0, 0), cache={})
    model.by_name = False
    with pytest.raises(UnitError, match="'KeysAndValues' is a cache"):
        model(rows(0, 0), cache=KeysAndValues())
    with torch.no_grad():
        model(rows(0, 0), cache={})
    itself = Nest()
    itself.layers[0].gradient_checkpointing = True
    with pytest.raises(StrategyError, match="gradient_checkpointing_disable"):
        shardwise.fully_shard(itself, strategy="ddp" + ASK["checkpointing"])
    shardwise.fully_shard(itself, strategy="ddp")  # nothing was changed


def test_accelerators_plugins_say_it():
    both = FullyShardedDataParallelPlugin(activation_checkpointing=True, activation_checkpointing_offload=True)
    assert str(both.to_strategy()) == "zero3" + ASK["both"]
    accelerator = shardwise.Accelerator(
        cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin(activation_checkpointing=True)
    )
    model = accelerator.prepare(Net())
    model(rows(0, 0)).sum().backward()
    assert [b.forwards for b in model.blocks] == [4, 2, 2]
    plugin = DeepSpeedPlugin({"activation_checkpointing": {"cpu_checkpointing": True}})
    assert str(plugin.to_strategy()) == "ddp" + ASK["offload"]
