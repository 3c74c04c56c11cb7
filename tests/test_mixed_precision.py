"""Mixed precision of models whose layers differ: normalisation, recurrent layers, labels and timesteps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import shardwise
from models import PRESETS, assert_same, rank, whole
from ranks import run
from shardwise import Accelerator
from shardwise.utils import GradScalerKwargs
from slowly import in_turn

D = 8
SCALE = GradScalerKwargs(init_scale=256.0)  # at which no gradient of these overflows
TOLERANCE = {"bf16": 2e-2, "fp16": 2e-3}


class PreciseNorm(nn.LayerNorm):
    """Computes in fp32 whatever it gets, as Whisper's and CLIP's do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).type(x.dtype)


class Norms(nn.Module):
    """A residual stream that stays in the dtype of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.norms = nn.Sequential(nn.LayerNorm(D), nn.GroupNorm(2, D), nn.RMSNorm(D), PreciseNorm(D))
        self.head = nn.Linear(D, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norms(x + self.inner(x)))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch_norm = nn.Conv1d(D, D, 1), nn.BatchNorm1d(D)
        self.instance_norm = nn.InstanceNorm1d(D, affine=True, track_running_stats=True)
        self.head = nn.Linear(D, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.instance_norm(self.batch_norm(self.conv(x[:, :, None].expand(-1, -1, 3)))).mean(-1))


class Recurrent(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.cells, self.head = kind(D, D, batch_first=True), nn.Linear(D, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cells(x[:, None].expand(-1, 3, -1))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(D, 2, 16, dropout=0.0, batch_first=True)
        self.both = nn.Bilinear(D, D, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.both(x, self.layer(x[:, None].expand(-1, 3, -1)).mean(1))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(5, D, mode="sum"), nn.Linear(D, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(5)[None].expand(len(x), -1)
        return self.head(x + self.bag(ids, per_sample_weights=x[:, :5]))


class Times(nn.Module):
    """Adds what belongs to a time, which is given as a float: the angles differ by far where it is rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(1200, D), nn.Linear(2 * D, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor | None = None) -> torch.Tensor:
        t = torch.full((len(x),), 999.0) if t is None else t
        return self.head(torch.cat([x + self.table(t.long()), torch.sin(t)[:, None].expand(-1, D)], 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "norms": Norms,
    "convolutions": Convolutions,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "attention": Attention,
    "bag": Bag,
    "times": Times,
    "norm units": lambda: nn.Sequential(nn.Sequential(nn.BatchNorm1d(D), nn.BatchNorm1d(D)), nn.Linear(D, 4)),
    "spectral norm": lambda: nn.Sequential(spectral_norm(nn.Linear(D, D)), nn.utils.spectral_norm(nn.Linear(D, 4))),
}


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]()


def rows(step: int, of: int) -> torch.Tensor:
    return torch.randn(4, D, generator=torch.Generator().manual_seed(10 * step + of))


def train(name: str, strategy: str, precision: str | None) -> tuple[list[float], dict[str, torch.Tensor], torch.Tensor]:
    """Losses, whole values, and what the trained model computes in evaluation."""
    accelerator = Accelerator(cpu=True, strategy=strategy, mixed_precision=precision, kwargs_handlers=[SCALE])
    model = make(name)
    model, opt = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    losses = []
    for step in range(3):
        loss = (model(rows(step, rank())) - 1.5).square().mean()
        assert loss.dtype == torch.float32
        accelerator.backward(loss)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        seen = model(rows(9, 0))
    assert not torch.is_autocast_enabled("cpu"), "autocast ends with the forward"
    return losses, whole(model), seen


STRATEGIES = [
    *PRESETS,
    "zero3,offload_params=cpu,offload_optimizer=cpu",
    "zero2,activation_checkpointing=true",
]


def every_strategy(name: str, precision: str) -> None:
    exact = train(name, "ddp", None)
    first = train(name, "ddp", precision)
    torch.testing.assert_close(first[0], exact[0], rtol=TOLERANCE[precision], atol=0)
    for other, own in zip(first[1].values(), exact[1].values(), strict=True):
        assert other.dtype == own.dtype, "masters and buffers keep their dtypes"
        torch.testing.assert_close(other, own, rtol=0, atol=TOLERANCE[precision])
    for strategy in STRATEGIES[1:]:
        if "checkpointing" in strategy and name != "norm units":
            continue  # the others have no unit below the root
        losses, values, seen = train(name, strategy, precision)
        assert losses == first[0], strategy
        assert_same(values, first[1])
        assert torch.equal(seen, first[2]), strategy


@in_turn(precision=["bf16", "fp16"], name=MODELS)
def test_models_train_as_in_fp32_and_strategies_agree(name, precision):
    run(2, every_strategy, name, precision)


def alone(name: str, precision: str) -> None:
    model, oracle = make(name), make(name)
    opts = [torch.optim.SGD(m.parameters(), lr=0.05) for m in (model, oracle)]
    accelerator = Accelerator(cpu=True, strategy="zero3", mixed_precision=precision, kwargs_handlers=[SCALE])
    prepared, opts[0] = accelerator.prepare(model, opts[0])
    for step in range(3):
        for m, o, backward in ((prepared, opts[0], accelerator.backward), (oracle, opts[1], torch.Tensor.backward)):
            backward((m(rows(step, 0)) - 1.5).square().mean())
            o.step()
            o.zero_grad()
    for own, right in zip(whole(prepared).values(), whole(oracle).values(), strict=True):
        torch.testing.assert_close(own, right, rtol=0, atol=TOLERANCE[precision])


def one_rank(precision: str) -> None:
    for name in MODELS:
        alone(name, precision)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_models_train_as_plain_pytorch_on_one_rank(precision):
    run(1, one_rank, precision)


# --- inputs -----------------------------------------------------------------------------------------
class LossInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) * self.scale
        return (x[:, 0] - labels).abs().mean()


def labels_and_times(strategy: str, precision: str) -> None:
    accelerator = Accelerator(cpu=True, strategy=strategy, mixed_precision=precision)
    label = 2049.0 if precision == "fp16" else 1001.0  # neither is a number of that precision
    x, labels = torch.zeros(3, 2), torch.full((3,), label)
    model = accelerator.prepare(LossInside())
    assert model(x, labels=labels).item() == label
    as_before = Accelerator(cpu=True, strategy=f"{strategy},param_dtype={precision},autocast=false")
    assert as_before.prepare(LossInside())(x, labels=labels).item() == label - 1
    times = accelerator.prepare(make("times"))
    at = {t: times(torch.zeros(1, D), torch.tensor([t])) for t in (998.0, 999.0, 1000.0)}
    for t, seen in at.items():
        torch.testing.assert_close(seen, make("times")(torch.zeros(1, D), torch.tensor([t])), rtol=0, atol=2e-2)
    assert not torch.equal(at[999.0], at[1000.0])
    only_moved = accelerator.prepare_model(LossInside(), evaluation_mode=True)
    assert only_moved(x, labels=labels).item() == label
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("strategy", PRESETS)
def test_labels_and_timesteps_are_not_rounded(strategy, precision):
    run(2, labels_and_times, strategy, precision)


def evaluated() -> None:
    for name in MODELS:
        model = make(name).eval()
        right = copy.deepcopy(model)(rows(0, 0))
        for more in ("", ",autocast=false") if name in ("convolutions", "lstm", "norm units") else ("",):
            accelerator = Accelerator(cpu=True, strategy="ddp,param_dtype=bf16" + more)
            prepared = accelerator.prepare_model(copy.deepcopy(model), evaluation_mode=True)
            torch.testing.assert_close(prepared(rows(0, 0)), right, rtol=2e-2, atol=0.1)
            assert {b.dtype for b in prepared.buffers()} == {b.dtype for b in model.buffers()}


def test_models_for_evaluation_only_compute_as_sharded_ones():
    run(1, evaluated)


# --- where inputs are cast --------------------------------------------------------------------------
def cast_inputs(strategy: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, 4))
    oracle = copy.deepcopy(model)
    dtypes = []
    shardwise.fully_shard(model, strategy=f"{strategy},param_dtype=bf16", units=(nn.Linear, nn.BatchNorm1d))
    model[1].register_forward_hook(lambda m, a, out: dtypes.append((a[0].dtype, m.weight.dtype, out.dtype)))
    for mode in (True, False):
        for m in (model, oracle):
            m.train(mode)
        out, right = model(rows(0, 0)), oracle(rows(0, 0))
        torch.testing.assert_close(out.float(), right, rtol=0, atol=0.05)
        out.float().sum().backward()
    assert set(dtypes) == {(torch.bfloat16, torch.float32, torch.bfloat16)}
    torch.testing.assert_close(model[1].running_var, oracle[1].running_var, rtol=0, atol=1e-2)
    assert model[1].running_var.dtype == torch.float32


@pytest.mark.parametrize("strategy", PRESETS)
def test_batch_norm_beside_fully_shard_in_bf16(strategy):
    run(2, cast_inputs, strategy)


def bytes_of(strategy: str) -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, 4))
    shardwise.fully_shard(model, strategy=f"{strategy},param_dtype=bf16", units=(nn.Linear, nn.BatchNorm1d))
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        shardwise.reset_stats(model)
        model(rows(0, 0)).float().sum().backward()
        opt.step()
        opt.zero_grad()
    found, want = shardwise.stats(model), shardwise.expected(model, optimizer_tensors=0)
    sent = sum(found.comm[kind].bytes_sent for kind in ("gather", "reduce") if kind in found.comm)
    assert (sent, found.live["parameters"], found.live["optimizer"]) == (
        want.sent_per_step, want.parameters, want.optimizer,
    )  # fmt: skip
    assert shardwise.expected(model, f"{strategy},param_dtype=bf16,timeout=9", optimizer_tensors=0) == want


@pytest.mark.parametrize("strategy", PRESETS)
def test_formulas_know_what_keeps_its_dtype(strategy):
    run(2, bytes_of, strategy)


# --- where autocast begins and ends -----------------------------------------------------------------
class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.fail = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        if self.fail:
            raise ValueError("as asked")
        with torch.autocast("cpu", enabled=False):
            assert not torch.is_autocast_enabled("cpu")
            return self.inner(x)


def regions() -> None:
    model = shardwise.fully_shard(Fails(), strategy="zero3,param_dtype=bf16,autocast=true", units=nn.Linear)
    with pytest.raises(ValueError, match="as asked"):
        model(rows(0, 0))
    assert not torch.is_autocast_enabled("cpu"), "a forward that fails ends it too"
    model.fail = False
    assert model(rows(0, 0)).dtype == torch.bfloat16
    assert model.inner(rows(0, 0)).dtype == torch.bfloat16, "a unit that is called by itself"
    twin = copy.deepcopy(model)
    assert torch.equal(twin(rows(0, 0)), model(rows(0, 0)))
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("size", [1, 2])
def test_autocast_is_on_inside_forwards_only(size):
    run(size, regions)


def compiled() -> None:
    model = make("norms")
    right = copy.deepcopy(model)(rows(0, 0)).detach()
    accelerator = Accelerator(cpu=True, strategy="zero3", mixed_precision="bf16", dynamo_backend="aot_eager")
    model = accelerator.prepare(model)
    for _ in range(2):
        out = model(rows(0, 0))
        accelerator.backward(F.mse_loss(out, right))
    torch.testing.assert_close(out, right, rtol=0, atol=0.05)


def test_compiled_models_run_under_autocast_too():
    run(1, compiled)
