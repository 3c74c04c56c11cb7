"""What a real model does to an engine, each against one plain process on the concatenated batch."""

from __future__ import annotations

import copy
import dataclasses
import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import shardwise
from models import PRESETS, adamw, assert_close, assert_same, batch, loss_of, make, rank, whole, world
from ranks import run
from shardwise.engine.engine import Engine
from shardwise.engine.hooks import engine_of
from shardwise.errors import GradientError, OptimizerError, ReleasedParameterError, UnitError

D = 8


def data(step: int, r: int, rows: int = 3, d: int = D) -> torch.Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(77 * step + r))


def compare(
    build: Any, strategy: str, size: int, steps: int = 3, lr: float = 0.05, tol: float = 1e-5, loss: Any = None
):
    """Train ``build()`` sharded on this rank's rows and plain on all rows; same weights, same missing gradients."""
    loss = loss or (lambda m, x, k: m(x).square().mean())
    torch.manual_seed(5)
    model, oracle = build(), None
    torch.manual_seed(5)
    oracle = build()
    shardwise.fully_shard(model, strategy=strategy)
    kw = {"lr": lr, "momentum": 0.9, "weight_decay": 0.1}
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **kw)
    ref = torch.optim.SGD([p for p in oracle.parameters() if p.requires_grad], **kw)
    for step in range(steps):
        loss(model, data(step, rank()), step).backward()
        loss(oracle, torch.cat([data(step, r) for r in range(size)]), step).backward()
        has = {n for n, p in model.named_parameters() if p.grad is not None}
        assert has == {n for n, p in oracle.named_parameters() if p.grad is not None}
        opt.step()
        ref.step()
        opt.zero_grad()
        ref.zero_grad()
    assert_close(whole(model), whole(oracle), tol)


# --- models -------------------------------------------------------------------------------------
class Mlp(nn.Module):
    def __init__(self, n: int = 3, **kw: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class TiedAcrossUnits(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.layers[2].weight = self.layers[0].weight


class Lora(nn.Module):
    """Frozen base, trainable adapters; the first frozen layer is needed after the last adapter gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.blocks = nn.ModuleList()
        for _ in range(3):
            self.blocks.append(LoraBlock())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        for b in self.blocks:
            x = b(x)
        return x


class LoraBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D).requires_grad_(False)
        self.base = nn.Linear(D, D, dtype=torch.bfloat16).requires_grad_(False)
        self.a = nn.Linear(D, 2, bias=False)
        self.b = nn.Linear(2, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        return x + self.base(x.bfloat16()).float() + self.b(self.a(x))


class MixedDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(2):
            layer = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D, dtype=torch.float64))
            self.layers.append(Cast(layer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Cast(nn.Module):
    def __init__(self, pair: nn.Module) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.pair[1](self.pair[0](x).double()).float())


class OddSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.none = nn.Parameter(torch.empty(0))
        self.layers = nn.ModuleList(nn.Linear(k, k + 2) for k in (1,))
        self.layers.append(nn.Linear(3, 7))
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x[:, :1])) * self.gain + self.one


class Twice(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x))


@dataclasses.dataclass
class Out:
    first: torch.Tensor
    rest: dict[str, Any]


class Opaque:
    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(NestedBlock() for _ in range(3))

    def forward(self, x: torch.Tensor) -> Any:
        out = Out(x, {"extra": (Opaque(x), [x])})
        for layer in self.layers:
            out = layer(out, scale=2.0)
        return out


class NestedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.side = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, out: Out, scale: float) -> Out:
        x = self.lin(out.first) + out.rest["extra"][0].value
        return Out(torch.tanh(x), {"extra": (Opaque(self.side(x) * scale), [None, x])})


def nested_loss(model: nn.Module, x: torch.Tensor, step: int) -> torch.Tensor:
    out = model(x)
    return out.first.square().mean() + out.rest["extra"][0].value.square().mean()


class SkipsUnits(Mlp):
    """Uses layer 1 in even steps only."""

    step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        if self.step % 2 == 0:
            x = torch.tanh(self.layers[1](x))
        return self.layers[2](x)


def skipping_loss(model: nn.Module, x: torch.Tensor, step: int) -> torch.Tensor:
    model.step = step
    return model(x).square().mean()


class DirectUse(nn.Module):
    """A tied head by function, and a parameter of a child used without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(D, 40, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(40, 40) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for b in self.blocks:
            h = torch.tanh(b(h))
        return F.linear(h, self.embed.weight.t()) + F.linear(h, self.blocks[0].weight).mean(-1, keepdim=True)


class Checkpointed(Mlp):
    reentrant = False
    group = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_() if self.reentrant else x
        for layer in self.layers:
            x = checkpoint(lambda y, layer=layer: torch.tanh(layer(y)), x, use_reentrant=self.reentrant)
        return x


class Reentrant(Checkpointed):
    reentrant = True


class ReentrantTwice(Checkpointed):
    """One unit under two reentrant checkpoints: its gradients arrive twice in one backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        for layer in [*self.layers, self.layers[0], self.layers[1]]:
            x = checkpoint(lambda y, layer=layer: torch.tanh(layer(y)), x, use_reentrant=True)
        return x


class InsideCheckpoint(nn.Module):
    """The unit is the outer module and checkpoints its own inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Checkpointed(2) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class BatchNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Moe(nn.Module):
    """An auxiliary loss left on the module, outside any output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AuxBlock() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class AuxBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.gate = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.aux = self.gate(x).square().mean()
        return torch.tanh(self.lin(x))


def moe_loss(model: nn.Module, x: torch.Tensor, step: int) -> torch.Tensor:
    return model(x).square().mean() + 0.1 * sum(layer.aux for layer in model.layers)


CASES = [
    (Mlp, None), (TiedAcrossUnits, None), (Lora, None), (MixedDtypes, None), (OddSizes, None), (Twice, None),
    (Nested, nested_loss), (SkipsUnits, skipping_loss), (DirectUse, None), (Checkpointed, None), (Reentrant, None),
    (ReentrantTwice, None), (InsideCheckpoint, None), (BatchNormed, None), (Moe, moe_loss),
]  # fmt: skip


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("strategy", PRESETS)
@pytest.mark.parametrize(("build", "loss"), CASES, ids=[c[0].__name__ for c in CASES])
def test_model(build, loss, strategy, size):
    tol = 1e-3 if build is Lora else 1e-5  # its bf16 base rounds otherwise in a larger batch
    run(size, compare, build, strategy, size, 4, 0.05, tol, loss)


@pytest.mark.parametrize("build", [Mlp, TiedAcrossUnits, Lora, SkipsUnits])
def test_model_on_four_ranks_in_groups(build):
    run(4, compare, build, "hsdp,shard_size=2", 4, 4, 0.05, 1e-5, skipping_loss if build is SkipsUnits else None)


# --- freezing, branches, interleaving -----------------------------------------------------------------
def freezing(strategy: str, size: int) -> None:
    torch.manual_seed(5)
    model = Mlp()
    torch.manual_seed(5)
    oracle = Mlp()
    shardwise.fully_shard(model, strategy=strategy)
    opts = [torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=0.1) for m in (model, oracle)]
    for step in range(6):
        for m in (model, oracle):
            m.layers[1].requires_grad_(step not in (1, 2))
            m.layers[0].weight.requires_grad_(step != 3)
        model(data(step, rank())).square().mean().backward()
        oracle(torch.cat([data(step, r) for r in range(size)])).square().mean().backward()
        for o in opts:
            o.step()
            o.zero_grad()
    assert_close(whole(model), whole(oracle))


@pytest.mark.parametrize("strategy", PRESETS)
def test_freezing_and_unfreezing_mid_run(strategy):
    run(2, freezing, strategy, 2)


class Branches(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.layers[1 + self.which % 2]
        return chosen(torch.tanh(self.layers[0](x)))


def branching(strategy: str, size: int) -> None:
    torch.manual_seed(5)
    model = Branches()
    torch.manual_seed(5)
    oracle = Branches()
    shardwise.fully_shard(model, strategy=strategy)
    opts = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, oracle)]
    for step in range(5):
        model.which = rank() if step != 3 else 0
        model(data(step, rank())).square().mean().backward()
        for r in range(size):
            oracle.which = r if step != 3 else 0
            (oracle(data(step, r)).square().mean() / size).backward()
        assert (model.layers[2].weight.grad is None) == (step == 3)
        for o in opts:
            o.step()
            o.zero_grad()
    assert_close(whole(model), whole(oracle))


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2"])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_in_different_branches_get_the_true_mean(strategy, size):
    run(size, branching, strategy, size)


def interleaved(strategy: str, size: int) -> None:
    """Evaluation and generation forwards between a training forward and its backward."""
    torch.manual_seed(5)
    model = Mlp()
    torch.manual_seed(5)
    oracle = Mlp()
    shardwise.fully_shard(model, strategy=strategy)
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, oracle)]
    for step in range(4):
        rows = torch.cat([data(step, r) for r in range(size)])
        loss = model(data(step, rank())).square().mean()
        with torch.no_grad():
            torch.testing.assert_close(model(rows), oracle(rows))
        second = model(data(step + 50, rank())).square().mean()
        model.eval()
        with torch.inference_mode():
            torch.testing.assert_close(model(rows), oracle(rows))
        model.train()
        (loss + second).backward()
        more = torch.cat([data(step + 50, r) for r in range(size)])
        (oracle(rows).square().mean() + oracle(more).square().mean()).backward()
        for o in opts:
            o.step()
            o.zero_grad()
    assert_close(whole(model), whole(oracle))


@pytest.mark.parametrize("strategy", PRESETS)
def test_forwards_without_gradients_in_between(strategy):
    run(2, interleaved, strategy, 2)


def gan(strategy: str, size: int) -> None:
    def build():
        torch.manual_seed(5)
        return Mlp(2), Mlp(2)

    g, d = build()
    g0, d0 = build()
    shardwise.fully_shard(g, strategy=strategy)
    shardwise.fully_shard(d, strategy="ddp" if strategy == "zero3" else strategy)
    opts = [torch.optim.Adam(m.parameters(), lr=0.01) for m in (g, d, g0, d0)]
    for step in range(4):
        for gen, dis, og, od, x in (
            (g, d, opts[0], opts[1], data(step, rank())),
            (g0, d0, opts[2], opts[3], torch.cat([data(step, r) for r in range(size)])),
        ):
            (dis(gen(x).detach()).mean() - dis(x).mean()).backward()
            od.step()
            od.zero_grad()
            og.zero_grad()
            (-dis(gen(x)).mean()).backward()
            og.step()
            og.zero_grad()
            od.zero_grad()
    assert_close(whole(g), whole(g0), 1e-4)
    assert_close(whole(d), whole(d0), 1e-4)


@pytest.mark.parametrize("strategy", PRESETS)
def test_two_models(strategy):
    run(2, gan, strategy, 2)


def gradient_penalty(strategy: str, size: int) -> None:
    def loss(model, x, step):
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return model(x).square().mean() + g.square().mean()

    compare(Mlp, strategy, size, 3, 0.05, 1e-5, loss)


@pytest.mark.parametrize("strategy", PRESETS)
def test_second_order_gradients(strategy):
    run(2, gradient_penalty, strategy, 2)


# --- torch.compile --------------------------------------------------------------------------------
def compiled(strategy: str, size: int, how: str) -> None:
    def build():
        model = Mlp()
        for i, layer in enumerate(model.layers):
            if how == "wrapped":
                model.layers[i] = torch.compile(layer, backend="aot_eager")
            else:
                layer.compile(backend="aot_eager")
        return model

    compare(build, strategy, size, 3)


@pytest.mark.parametrize("how", ["wrapped", "in place"])
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_compiled_blocks(strategy, how):
    run(2, compiled, strategy, 2, how)


# --- exceptions that the caller survives ------------------------------------------------------------------
def fail(grad: torch.Tensor) -> None:
    raise MemoryError("pretend")


def surviving(strategy: str, size: int) -> None:
    """All ranks fail in one backward, catch it and go on, as an out-of-memory retry does."""
    torch.manual_seed(5)
    model = Mlp()
    torch.manual_seed(5)
    oracle = Mlp()
    shardwise.fully_shard(model, strategy=strategy)
    opts = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, oracle)]
    for step in range(4):
        if step == 2:
            middle = model.layers[1].register_forward_hook(lambda m, a, out: out.register_hook(fail) and None)
            with pytest.raises(MemoryError):
                model(data(9, rank())).square().mean().backward()
            middle.remove()
        model(data(step, rank())).square().mean().backward()
        oracle(torch.cat([data(step, r) for r in range(size)])).square().mean().backward()
        for o in opts:
            o.step()
            o.zero_grad()
    assert_close(whole(model), whole(oracle))


@pytest.mark.parametrize("strategy", PRESETS)
def test_a_failed_backward_can_be_survived(strategy):
    run(2, surviving, strategy, 2)


# --- accumulation -------------------------------------------------------------------------------------
def accumulating(strategy: str, size: int, how: str) -> None:
    model, oracle = make(), make()
    shardwise.fully_shard(model, strategy=strategy)
    opt, ref = adamw(model.parameters()), adamw(oracle.parameters())
    for step in range(2):
        for micro in range(3):
            k = 10 * step + micro
            if how == "no_sync" and micro < 2:
                with shardwise.no_sync(model):
                    loss_of(model, batch(k, rank())).backward()
            else:
                loss_of(model, batch(k, rank())).backward()
            loss_of(oracle, torch.cat([batch(k, r) for r in range(size)])).backward()
        with shardwise.gathered(model, grads=True):
            for (n, p), q in zip(model.named_parameters(), oracle.parameters(), strict=True):
                if q.grad is None:
                    assert p.grad is None
                else:
                    torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=n)
        shardwise.clip_grad_norm_(model, 0.3)
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.3)
        opt.step()
        ref.step()
        opt.zero_grad(set_to_none=step == 0)
        ref.zero_grad(set_to_none=step == 0)
    assert_close(whole(model), whole(oracle), 1e-4)


@pytest.mark.parametrize("strategy", PRESETS)
@pytest.mark.parametrize("how", ["no_sync", "every micro-batch reduced"])
def test_accumulation(strategy, how):
    run(2, accumulating, strategy, 2, how)
    if strategy == "zero3":
        run(4, accumulating, "hsdp,shard_size=2", 4, how)


def zeroed_under_no_sync(strategy: str) -> None:
    """What was gathered under no_sync and then zeroed does not come back with a backward that goes elsewhere."""
    torch.manual_seed(5)
    model = shardwise.fully_shard(Branches(), strategy=strategy)
    for sync in (False, True):
        model.which = 0
        with shardwise.no_sync(model):
            model(data(0, rank())).mean().backward()
        assert model.layers[1].weight.grad is not None
        model.zero_grad()
        model.which = 1
        with nullcontext() if sync else shardwise.no_sync(model):
            model(data(1, rank())).mean().backward()
        assert model.layers[1].weight.grad is None and model.layers[2].weight.grad is not None
        model.zero_grad()


@pytest.mark.parametrize("strategy", PRESETS)
def test_zeroed_gradients_stay_zeroed(strategy):
    run(2, zeroed_under_no_sync, strategy)


def stepping_too_early(strategy: str) -> None:
    model = shardwise.fully_shard(make(), strategy=strategy)
    opt = adamw(model.parameters())
    with shardwise.no_sync(model):
        loss_of(model, batch(0, rank())).backward()
    with pytest.raises(GradientError, match="no_sync"):
        opt.step()
    with pytest.raises(GradientError, match="no_sync"):
        shardwise.clip_grad_norm_(model, 1.0)
    before = whole(model)
    opt.zero_grad()
    loss_of(model, batch(1, rank())).backward()
    opt.step()
    oracle = make()
    ref = adamw(oracle.parameters())
    loss_of(oracle, torch.cat([batch(1, r) for r in range(world())])).backward()
    ref.step()
    assert_close(whole(model), whole(oracle), 1e-4)
    assert any(not torch.equal(before[k], v) for k, v in whole(oracle).items())


@pytest.mark.parametrize("strategy", PRESETS)
def test_step_on_unreduced_gradients_is_an_error(strategy):
    run(2, stepping_too_early, strategy)


# --- clipping ------------------------------------------------------------------------------------------
def clipping(strategy: str, size: int) -> list[float]:
    out = []
    for norm_type in (2.0, 1.0, 3.0, float("inf")):
        model, oracle = make(tied=True), make(tied=True)
        shardwise.fully_shard(model, strategy=strategy)
        loss_of(model, batch(0, rank())).backward()
        loss_of(oracle, torch.cat([batch(0, r) for r in range(size)])).backward()
        before = shardwise.stats().comm.get("norm", None)
        calls = before.calls if before else 0
        mine = shardwise.clip_grad_norm_(model.parameters(), 0.01, norm_type)
        after = shardwise.stats().comm.get("norm", None)
        assert (after.calls if after else 0) - calls <= 1, "one collective"
        theirs = torch.nn.utils.clip_grad_norm_(oracle.parameters(), 0.01, norm_type)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
        # torch's own function, unaware of shards, agrees
        again = torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0, norm_type)
        torch.testing.assert_close(again, torch.tensor(0.01), rtol=1e-3, atol=0)
        shardwise.clip_grad_value_(model, 1e-5)
        torch.nn.utils.clip_grad_value_(oracle.parameters(), 1e-5)
        with shardwise.gathered(model, grads=True):
            for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
                if q.grad is not None:
                    torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-9)
        out.append(mine.item())
    return out


@pytest.mark.parametrize("strategy", PRESETS)
def test_clipping_is_exact_and_torchs_own_is_right(strategy):
    run(2, clipping, strategy, 2)
    if strategy == "zero3":
        run(3, clipping, strategy, 3)


def refusing(strategy: str) -> None:
    model = shardwise.fully_shard(make(), strategy=strategy)
    loss_of(model, batch(0, rank())).backward()
    with pytest.raises(GradientError, match="split over the ranks"):
        model.head.weight.grad.sum()
    with pytest.raises(GradientError, match="split over the ranks"):
        _ = model.head.weight.grad + 1


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_other_operations_on_split_gradients_raise(strategy):
    run(2, refusing, strategy)


# --- released parameters ---------------------------------------------------------------------------------
def released() -> None:
    model = make()
    names, objects = dict(model.named_parameters()), {n: id(p) for n, p in model.named_parameters()}
    shapes = {n: p.shape for n, p in names.items()}
    assert shardwise.fully_shard(model, strategy="zero3") is model
    assert {n: id(p) for n, p in model.named_parameters()} == objects
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    weight = model.blocks[0].up.weight
    uses = [
        lambda: weight + 1,
        lambda: weight.data,
        lambda: weight.sum(),
        lambda: weight.numpy(),
        lambda: weight.tolist(),
    ]
    for use in [*uses, lambda: torch._foreach_add([weight], 1.0)]:
        with pytest.raises(ReleasedParameterError, match=r"blocks\.0\.up\.weight"):
            use()
    with pytest.raises(ReleasedParameterError, match="copy the whole model"):
        copy.deepcopy(weight)
    for action in (lambda: copy.deepcopy(model), lambda: torch.optim.swa_utils.AveragedModel(model)):
        with pytest.raises(shardwise.ShardwiseError, match="copy"):
            action()
    assert "blocks.0.up.weight" in repr(weight)
    with shardwise.gathered(model.blocks[0], write=True):
        assert torch.equal(weight, make().blocks[0].up.weight)
        with torch.no_grad():
            weight.fill_(rank() + 1.0)
    assert bool((whole(model)["blocks.0.up.weight"] == 1.0).all()), "rank 0's values, for everyone"


def test_released_parameters_keep_their_identity_and_cannot_be_misread():
    run(2, released)


def cannot_copy(strategy: str) -> None:
    model = shardwise.fully_shard(make(), strategy=strategy)
    with pytest.raises(shardwise.ShardwiseError, match="cannot be copied"):
        copy.deepcopy(model)


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2"])
def test_deepcopy_is_a_clear_error(strategy):
    run(2, cannot_copy, strategy)


def ema(strategy: str, size: int) -> None:
    """An average kept beside the model, both sharded, updated on gathered values."""
    model, mean, oracle, oracle_mean = make(), make(), make(), make()
    shardwise.fully_shard(model, strategy=strategy)
    shardwise.fully_shard(mean, strategy=strategy)
    opt, ref = adamw(model.parameters()), adamw(oracle.parameters())
    for step in range(2):
        loss_of(model, batch(step, rank())).backward()
        loss_of(oracle, torch.cat([batch(step, r) for r in range(size)])).backward()
        for o in (opt, ref):
            o.step()
            o.zero_grad()
        with torch.no_grad(), shardwise.gathered(model), shardwise.gathered(mean, write=True):
            for a, b in zip(mean.parameters(), model.parameters(), strict=True):
                a.lerp_(b, 0.5)
        with torch.no_grad():
            for a, b in zip(oracle_mean.parameters(), oracle.parameters(), strict=True):
                a.lerp_(b, 0.5)
    assert_close(whole(mean), whole(oracle_mean), 1e-4)


@pytest.mark.parametrize("strategy", PRESETS)
def test_ema(strategy):
    run(2, ema, strategy, 2)


# --- buffers, state dicts -----------------------------------------------------------------------------------
class Bn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def buffers(strategy: str) -> None:
    torch.manual_seed(rank())  # ranks start differently: rank 0's values count
    model = shardwise.fully_shard(Bn(), strategy=strategy)
    torch.manual_seed(0)
    oracle = Bn()
    opt, ref = adamw(model.parameters()), adamw(oracle.parameters())
    for step in range(3):
        model(data(step, rank())).square().mean().backward()
        opt.step()
        opt.zero_grad()
        oracle(data(step, 0))
    del ref
    model(data(9, rank()))  # the next training forward brings rank 0's buffers, then each rank adds its own batch
    torch.testing.assert_close(model.net[1].num_batches_tracked, torch.tensor(4))
    if rank() == 0:
        first = copy.deepcopy(model.net[1].running_mean)
        assert first.shape == (D,)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_buffers_follow_rank_zero(strategy):
    run(2, buffers, strategy)


def state_dicts(strategy: str) -> None:
    model = shardwise.fully_shard(make(tied=True), strategy=strategy)
    plain = make(tied=True)
    assert_same(whole(model), whole(plain))
    other = make(seed=3, tied=True)
    assert str(model.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
    assert_same(whole(model), whole(other))
    ids = batch(0, 0)
    torch.testing.assert_close(loss_of(model, ids), loss_of(other, ids))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**other.state_dict(), "norm.weight": torch.ones(99)})
    with pytest.raises(UnitError, match="assign"):
        model.load_state_dict(other.state_dict(), assign=True)
    assert_same(whole(model), whole(other))


@pytest.mark.parametrize("strategy", [*PRESETS, "zero3,param_dtype=bf16", "ddp,param_dtype=bf16"])
def test_state_dict_and_load(strategy):
    if "bf16" in strategy:
        run(2, bf16_state_dict, strategy)
    else:
        run(2, state_dicts, strategy)


def bf16_state_dict(strategy: str) -> None:
    model = shardwise.fully_shard(make(), strategy=strategy)
    assert_same(whole(model), whole(make()))
    other = make(seed=3)
    model.load_state_dict(other.state_dict())
    assert_same(whole(model), whole(other))


# --- misuse ---------------------------------------------------------------------------------------------
def misuse() -> None:
    model = shardwise.fully_shard(make(), strategy="zero2")
    with pytest.raises(UnitError, match="already"):
        shardwise.fully_shard(model)
    with pytest.raises(UnitError, match="matches no module"):
        shardwise.fully_shard(make(), units="Nope")
    for bad in (torch.optim.LBFGS(model.parameters()), torch.optim.SparseAdam(list(model.parameters()))):
        loss_of(model, batch(0, rank())).backward()
        with pytest.raises(OptimizerError):
            bad.step(lambda: torch.tensor(0.0))


def sparse_gradients() -> None:
    model = shardwise.fully_shard(nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 4)), strategy="zero2")
    with pytest.raises(UnitError, match=r"'0\.weight' has a sparse gradient"):
        model(torch.tensor([1, 2])).sum().backward()


def test_sparse_gradients_are_refused():
    run(2, sparse_gradients)


def test_misuse_is_named():
    run(2, misuse)


def units_by_hand(strategy: str, size: int, how: str) -> None:
    model, oracle = make(), make()
    if how == "class":
        shardwise.fully_shard(model, strategy=strategy, units=type(model.blocks[0]))
    elif how == "name":
        shardwise.fully_shard(model, strategy=strategy, units="Block")
    elif how == "predicate":
        shardwise.fully_shard(model, strategy=strategy, units=lambda name, m: name.endswith((".up", ".down")))
    else:
        for block in model.blocks:
            shardwise.fully_shard(block, strategy=strategy)
        shardwise.fully_shard(model, strategy=strategy)
    opt, ref = adamw(model.parameters()), adamw(oracle.parameters())
    for step in range(3):
        loss_of(model, batch(step, rank())).backward()
        loss_of(oracle, torch.cat([batch(step, r) for r in range(size)])).backward()
        for o in (opt, ref):
            o.step()
            o.zero_grad()
    assert_close(whole(model), whole(oracle), 1e-4)


class Unrepeated(nn.Module):
    """No repeated blocks: cut by size. Large enough for that, and odd enough to need it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(D, 512), nn.Tanh(), nn.Linear(512, 600))
        self.middle = nn.Bilinear(60, 60, 128)
        self.last = nn.ModuleDict({"a": nn.Linear(600, 600), "b": nn.Linear(728, 1)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        h = torch.cat([torch.tanh(self.last["a"](h)), self.middle(h[:, :60], h[:, 60:120])], dim=1)
        return self.last["b"](h)


def cut_by_size(strategy: str) -> list[str]:
    compare(Unrepeated, strategy, 2, 2, 0.01)
    model = shardwise.fully_shard(Unrepeated(), strategy=strategy)
    return [unit.name for unit in engine_of(model).units]


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_units_by_size_where_nothing_repeats(strategy):
    for names in run(2, cut_by_size, strategy):
        assert names == ["first.0", "first.2", "middle", "last.a", "last.b", ""]


@pytest.mark.parametrize("how", ["class", "name", "predicate", "submodules"])
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_units_chosen_by_hand(strategy, how):
    run(2, units_by_hand, strategy, 2, how)


# --- models that are dropped -----------------------------------------------------------------------------
def dropped(strategy: str) -> None:
    """At any moment of a step, with gathers and updates under way: nothing keeps a model that nobody uses."""

    def alive() -> int:
        gc.collect()
        return sum(type(found) is Engine for found in gc.get_objects())

    def up_to(moment: int) -> None:
        model = shardwise.fully_shard(make(), strategy=strategy)
        opt = adamw(model.parameters())
        loss = loss_of(model, batch(0, rank()))
        if moment > 0:
            loss.backward()
        if moment > 1:
            opt.step()

    before = alive()
    for moment in range(3):
        up_to(moment)
        assert alive() == before, moment
    dist.barrier()


@pytest.mark.parametrize("strategy", [*PRESETS, "zero3,offload_optimizer=nvme,offload_params=nvme"])
def test_a_model_that_is_dropped_is_gone(strategy):
    run(2, dropped, strategy)
