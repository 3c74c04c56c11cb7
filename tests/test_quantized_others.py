"""Quantised weights of other libraries: bytes to us, the same bits as without us, or one error that says what to do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import shardwise
from models import assert_same, rank, whole
from ranks import run
from shardwise.errors import UnitError

pytestmark = pytest.mark.filterwarnings("ignore")


class Pair(torch.Tensor):
    """A tensor made of tensors, as torchao's: rows of int8, and a scale each."""

    @staticmethod
    def __new__(cls, rows, scales):
        return torch.Tensor._make_wrapper_subclass(cls, rows.shape, dtype=scales.dtype, device=rows.device)

    def __init__(self, rows, scales):
        self.rows, self.scales = rows, scales

    def __tensor_flatten__(self):
        return ["rows", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, _context, _size, _stride):
        return cls(inner["rows"], inner["scales"])

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = args
            return F.linear(x, weight.rows.to(x.dtype) * weight.scales.to(x.dtype), bias)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].rows, args[0].scales)
        raise NotImplementedError(func)


def pair(layer: nn.Linear) -> nn.Linear:
    scales = layer.weight.detach().abs().amax(1, keepdim=True) / 127
    rows = (layer.weight.detach() / scales).round().to(torch.int8)
    layer.weight = nn.Parameter(Pair(rows, scales), requires_grad=False)
    return layer


def torchao(layer: nn.Linear) -> nn.Linear:
    library = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(layer)
    library.quantize_(holder, library.Int8WeightOnlyConfig())
    return holder[0]


def four_bits(layer: nn.Linear, **kw) -> nn.Module:
    library = pytest.importorskip("bitsandbytes").nn
    new = library.Linear4bit(layer.in_features, layer.out_features, quant_type="nf4")
    new.weight = library.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4", **kw)
    new.bias = layer.bias
    return new.to("cpu")


def four_bits_called_bf16(layer: nn.Linear) -> nn.Module:
    return four_bits(layer, quant_storage=torch.bfloat16)


def eight_bits(layer: nn.Linear) -> nn.Module:
    library = pytest.importorskip("bitsandbytes").nn
    new = library.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False)
    new.weight = library.Int8Params(layer.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    return new.to("cpu")


KINDS = [pair, torchao, four_bits, four_bits_called_bf16]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(x)))


class Adapter(nn.Module):
    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = (
            nn.Parameter(torch.randn(3, base.in_features) / 4),
            nn.Parameter(torch.zeros(base.out_features, 3)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


def made(kind, *, adapters: bool = False, plain: bool = True) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(3)), nn.Linear(64, 8)).requires_grad_(False)
    for block in model[:3]:
        block.up, block.down = kind(block.up), kind(block.down)
        if adapters:
            block.up, block.down = Adapter(block.up), Adapter(block.down)
    return shardwise.as_plain_parameters(model) if plain else model


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.reshape(-1).view(torch.uint8) for k, v in whole(model).items()}


def rows(seed: int) -> torch.Tensor:
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))


def trains(kind, strategy, changes):
    model = made(kind, adapters=True)
    if strategy:
        shardwise.fully_shard(model, strategy=shardwise.Strategy.parse(strategy).replace(**changes), units=[Block])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for step in range(3):
        loss = model(rows(10 * step + rank())).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if strategy:  # a layer of bitsandbytes packs its weight in such a forward, and cannot train with it afterwards
            with torch.no_grad():
                model.eval()(rows(99))
            model.train()
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_train_alike_with_and_without_us(kind):
    made(kind)  # skips where the library is missing
    alone = trains(kind, None, {})
    assert run(1, trains, kind, "zero3", {}) == [alone]
    split = run(2, trains, kind, "zero3", {})
    assert split[0][0] == alone[0] and split == run(2, trains, kind, "zero2", {"offload_params": "cpu"})
    if kind in (pair, torchao):
        assert split == run(2, trains, kind, "ddp", {})


@pytest.mark.parametrize("kind", [four_bits_called_bf16, pair])
def test_mixed_precision_leaves_their_bytes_alone(kind):
    made(kind)
    for dtype in ("bf16", "fp16"):
        low = run(2, trains, kind, "zero3", {"param_dtype": dtype})[0]
        assert low == pytest.approx(run(2, trains, kind, "zero3", {})[0], rel=0.1, abs=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_models_in_memory_are_dispatched(tmp_path, kind):
    model = made(kind)
    with torch.no_grad():
        expected = model(rows(0))  # training mode: bitsandbytes uses the weight as it is
    x = rows(1).requires_grad_()
    model(x).square().sum().backward()
    kept = sum(p.numel() * p.element_size() for p in model.parameters())
    shardwise.dispatch_model(model, {"1": "cpu", "": "disk"}, offload_dir=tmp_path)
    assert sum(model.shardwise_plan.nbytes.values()) == kept
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(model(rows(0)), expected)
    again = rows(1).requires_grad_()
    model(again).square().sum().backward()
    assert torch.equal(again.grad, x.grad)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(rows(0)), expected)
    assert_same(bits(model), bits(made(kind)))


def where_their_meaning_is(folder):
    model = made(four_bits)
    shardwise.dispatch_model(model, {"0": "cpu", "1": "disk", "": "sim:0"}, offload_dir=folder)
    return {str(block.up.weight.quant_state.absmax.device) for block in model[:3]}


def test_scales_of_bitsandbytes_are_where_the_model_runs(tmp_path):
    pytest.importorskip("bitsandbytes")
    assert run(1, where_their_meaning_is, tmp_path, device="sim") == [{"sim:0"}]


class Tagged(nn.Parameter):
    """A parameter with something to say."""


def test_a_copy_keeps_what_a_parameter_says_of_itself(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    model[0].weight = Tagged(model[0].weight.detach(), requires_grad=False)
    model[0].weight.meaning = torch.arange(3)
    model[0].weight.layer = model[0]
    twin = copy.deepcopy(shardwise.dispatch_model(model, {"": "disk"}, offload_dir=tmp_path))
    said = vars(twin[0].weight)
    assert torch.equal(said["meaning"], torch.arange(3)) and said["meaning"] is not model[0].weight.meaning
    assert said["layer"] is twin[0]
    assert torch.equal(twin(torch.ones(1, 8)), model(torch.ones(1, 8)))


def test_what_is_not_served_says_what_to_do():
    with pytest.raises(UnitError, match="Pair, a tensor made of other tensors") as error:
        shardwise.fully_shard(made(pair, plain=False), strategy="zero3")
    assert "as_plain_parameters" in str(error.value)
    with pytest.raises(UnitError, match="as_plain_parameters"):
        shardwise.dispatch_model(made(pair, plain=False), {"1": "disk", "": "cpu"}, offload_dir="unused")
    layer = pair(nn.Linear(64, 8))
    layer.weight.requires_grad_(True)
    with pytest.raises(UnitError, match="requires gradients"):
        shardwise.as_plain_parameters(layer)


def test_eight_bits_of_bitsandbytes_stay_whole():
    alone = trains(eight_bits, None, {})
    assert run(1, trains, eight_bits, "ddp", {}) == [alone]
    with pytest.raises(UnitError, match="8-bit"):
        shardwise.fully_shard(made(eight_bits), strategy="zero3")
    with pytest.raises(UnitError, match="8-bit"):
        shardwise.dispatch_model(made(eight_bits), {"1": "disk", "": "cpu"}, offload_dir="unused")
