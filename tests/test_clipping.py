"""Norms, clipping and loss scaling: every dtype, order and layout, and units on several meshes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import utils

import shardwise
from models import PRESETS, batch, loss_of, make, rank
from ranks import run
from shardwise.errors import GradientError
from slowly import slow

ORDERS = [1.0, 2.0, math.inf, 0.5]


class Weigh(nn.Module):
    """Its gradient is what it is called with, so a test may say which element is what."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).sum().real


class Sum(nn.Module):
    """One :class:`Weigh` per dtype; element ``k`` of part ``i`` has the gradient ``3 * k - i``, or its conjugate."""

    def __init__(self, dtypes: list[torch.dtype], n: int = 7) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Weigh(n, dtype) for dtype in dtypes)
        self.n = n

    def inputs(self) -> list[torch.Tensor]:
        k = torch.arange(self.n)
        turn = {True: 1 + 2j, False: 1}
        return [(turn[p.weight.is_complex()] * (3 * k - i)).to(p.weight.dtype) for i, p in enumerate(self.parts)]

    def forward(self, x: list[torch.Tensor]) -> torch.Tensor:
        return sum(part(x[i]).double() for i, part in enumerate(self.parts))


F32, F64, C64, BF16 = torch.float32, torch.float64, torch.complex64, torch.bfloat16
KINDS = {
    "double": [F64, F64],
    "complex": [C64, C64],
    "one double": [F32, F64, F32],  # on most ranks there is no piece of it
    "one complex": [C64, F32],
    "complex double": [torch.complex128],
    "single": [F32, F32, F32],
}


def sharded(dtypes: list[torch.dtype], strategy: str, **kw: Any) -> tuple[Sum, Sum]:
    """A sharded model and the same one left alone, both after a backward of the same inputs on all ranks."""
    models = [Sum(dtypes, **kw) for _ in range(2)]
    shardwise.fully_shard(models[0], strategy=strategy, units=Weigh)
    for model in models:
        model(model.inputs()).backward()
    return models[0], models[1]


def all_kinds(strategy: str) -> None:
    for kind, dtypes in KINDS.items():
        for order in ORDERS:
            for foreach in (None, True, False):
                ours, plain = sharded(dtypes, strategy)
                for model in (ours, plain):
                    model.norm = utils.get_total_norm([p.grad for p in model.parameters()], order, foreach=foreach)
                    again = utils.clip_grad_norm_(model.parameters(), 1.5, order, foreach=foreach)
                    assert torch.equal(again, model.norm)
                same(kind, ours, plain, ours.norm, plain.norm)
            ours, plain = sharded(dtypes, strategy)
            expected = utils.clip_grad_norm_(plain.parameters(), 1.5, order)
            same(kind, ours, plain, shardwise.clip_grad_norm_(ours, 1.5, order), expected)


def same(kind: str, ours: nn.Module, plain: nn.Module, norm: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0, msg=lambda m: f"{kind}: {m}")  # dtype, too
    with shardwise.gathered(ours, grads=True):
        for p, q in zip(ours.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0, msg=lambda m: f"{kind}: {m}")


@pytest.mark.parametrize(
    "strategy", ["ddp", slow("zero2"), "zero3", slow("zero1"), "zero3,layout=tensor", slow("hsdp,shard_size=1")]
)
def test_norms_are_those_of_torch(strategy):
    run(2, all_kinds, strategy)


def test_norms_on_one_rank():
    all_kinds("zero3")


def ranks_without_pieces() -> None:
    """Fewer parameters than ranks, and fewer elements."""
    for dtypes, n in (([F32], 1), ([F64], 3), ([F32, F64], 1), ([C64], 1)):
        for strategy in ("zero3,layout=tensor", "zero2", "hsdp,shard_size=2,layout=tensor"):
            for order in (2.0, math.inf):
                ours, plain = sharded(dtypes, strategy, n=n)
                expected = utils.clip_grad_norm_(plain.parameters(), 0.5, order)
                same("few", ours, plain, utils.clip_grad_norm_(ours.parameters(), 0.5, order), expected)
                ours, _ = sharded(dtypes, strategy, n=n)
                same("few", ours, plain, shardwise.clip_grad_norm_(ours, 0.5, order), expected)


def test_ranks_that_hold_nothing_take_part():
    run(4, ranks_without_pieces)


def refusals(strategy: str) -> None:
    ours, _ = sharded([F32], strategy)
    ours.parts[0].weight.grad.mul_(math.inf)
    for clip in (shardwise.clip_grad_norm_, utils.clip_grad_norm_):
        with pytest.raises(RuntimeError, match=r"nan|non-finite"):  # 0 * inf among them
            clip(ours.parameters(), 1.0, error_if_nonfinite=True)
        with pytest.raises(GradientError, match="order"):
            shardwise.clip_grad_norm_(ours, 1.0, -1.0)
    ours, _ = sharded([C64], strategy)
    with pytest.raises(GradientError, match="complex"):
        shardwise.clip_grad_value_(ours, 1.0)
    if strategy != "ddp":
        with pytest.raises(GradientError, match="complex"):
            utils.clip_grad_value_(ours.parameters(), 1.0)
        with pytest.raises(GradientError, match="order"):
            utils.clip_grad_norm_(ours.parameters(), 1.0, 0.0)


@pytest.mark.parametrize("strategy", ["ddp", "zero3", "zero3,layout=tensor"])
def test_all_ranks_refuse_alike(strategy):
    run(2, refusals, strategy)


# --- several meshes in one model --------------------------------------------------------------------------------------
def on_meshes(strategies: list[str | None], dtypes: list[torch.dtype] | None = None, n: int = 8) -> Sum:
    """Each part with a strategy of its own; ``None`` leaves it to the root's, the last."""
    model = Sum(dtypes or [F32] * (len(strategies) - 1), n)
    for part, strategy in zip(model.parts, strategies, strict=False):
        if strategy is not None:
            shardwise.fully_shard(part, strategy=strategy)
    return shardwise.fully_shard(model, strategy=strategies[-1], units=Weigh if None in strategies[:-1] else None)


MIXTURES: list[list[str | None]] = [
    ["hsdp,shard_size=2", "ddp", "zero3", "zero2"],
    [None, "hsdp,shard_size=2", "zero3"],
    ["zero3", "ddp", "hsdp,shard_size=2"],
    ["hsdp,shard_size=1", "hsdp,shard_size=4", "ddp"],
]


def norms_on_meshes() -> None:
    for strategies in MIXTURES:
        for dtypes in ([F32, F32, F32], [F32, F64, C64]):
            for order in (2.0, math.inf):
                kinds = dtypes[: len(strategies) - 1]
                plain = Sum(kinds, 8)
                plain(plain.inputs()).backward()
                expected = utils.clip_grad_norm_(plain.parameters(), 2.0, order)
                for clip in (shardwise.clip_grad_norm_, utils.clip_grad_norm_):
                    ours = on_meshes(strategies, kinds)
                    ours(ours.inputs()).backward()
                    same("meshes", ours, plain, clip(ours.parameters(), 2.0, order), expected)


def test_norms_over_several_meshes():
    run(4, norms_on_meshes)


def scaling_on_meshes(fused: bool) -> list[tuple[float, bool]]:
    """An overflow in one element, which one or two ranks hold: all skip the step, and halve the scale."""
    seen = []
    for strategies in MIXTURES:
        model = on_meshes(strategies)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=1.0)
        if fused:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
        for part in range(len(model.parts)):
            for element in (None, 0, 5, 7):
                x = model.inputs()
                if element is not None:
                    x[part][element] = 1e37  # times the scale, more than fp32 holds
                before = values(model)
                scaler.scale(model(x)).backward()
                if not fused:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scale = scaler.get_scale()
                scaler.update()
                optimizer.zero_grad()
                skipped = all(torch.equal(a, b) for a, b in zip(before, values(model), strict=True))
                assert skipped == (element is not None) == (scaler.get_scale() < scale), (strategies, part, element)
                seen.append((scaler.get_scale(), skipped))
                scaler.update(2.0**8)
    return seen


def values(model: nn.Module) -> list[torch.Tensor]:
    return [v.clone() for v in model.state_dict().values()]


@pytest.mark.parametrize("fused", [False, True])
def test_overflows_on_several_meshes_are_skipped_by_all(fused):
    first, *rest = run(4, scaling_on_meshes, fused)
    assert all(other == first for other in rest)


def scaling_complex() -> list[float]:
    model = shardwise.fully_shard(Sum([C64]), strategy="zero3,layout=tensor")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    found = []
    for imaginary in (1.0, math.inf):
        x = [torch.full((7,), 1.0 + 0j, dtype=C64)]
        x[0][3] = complex(0.0, imaginary)
        scaler.scale(model(x)).backward()
        scaler.unscale_(optimizer)
        found.append(float(scaler._found_inf_per_device(optimizer)[torch.device("cpu")]))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return found


def test_complex_gradients_are_unscaled():
    assert run(2, scaling_complex) == [[0.0, 1.0]] * 2


def trained_on_meshes(strategies: list[str | None]) -> list[float]:
    """Different data on each rank, steps with clipping: as on one process with all the data."""
    model, plain = on_meshes(strategies), Sum([F32] * (len(strategies) - 1), 8)
    optimizers = [torch.optim.Adam(m.parameters(), lr=0.1) for m in (model, plain)]
    norms = []
    for step in range(3):
        x = model.inputs()
        model([v * (rank() + step) for v in x]).backward()
        plain([v * (1.5 + step) for v in x]).backward()  # the mean over four ranks
        norms.append(float(utils.clip_grad_norm_(model.parameters(), 1.0)))
        assert norms[-1] == pytest.approx(float(utils.clip_grad_norm_(plain.parameters(), 1.0)), rel=1e-6)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(values(model), values(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    return norms


@pytest.mark.parametrize("strategies", MIXTURES[:2])
def test_training_on_several_meshes(strategies):
    first, *rest = run(4, trained_on_meshes, strategies)
    assert all(other == first for other in rest)


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
