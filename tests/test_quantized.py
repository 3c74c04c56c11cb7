"""int8 weights: their arithmetic, their files, models that run with them from anywhere, and training beside them."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import shardwise
from models import adamw, assert_close, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise import Accelerator, QuantizedLinear
from shardwise.engine.hooks import engine_of
from shardwise.errors import CheckpointError, OffloadError, UnitError
from shardwise.inference import planning
from shardwise.inference.rates import Rates

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore")


# --- one layer ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rows", "columns", "block", "dtype"),
    [
        (7, 128, 128, "float32"),
        (5, 100, 32, "bfloat16"),
        (3, 5, 128, "float16"),
        (600, 1030, 64, "float32"),
        (2, 1, 1, "float64"),
    ],
)
def test_no_weight_is_further_off_than_half_a_step_of_its_block(rows, columns, block, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, dtype=getattr(torch, dtype))
    with torch.no_grad():
        layer.weight *= torch.logspace(-3, 3, rows)[:, None]
        layer.weight[0, 0] = 0.0
        layer.weight[1, : columns // 2] = 0.0
    before = layer.weight.detach().float()
    quantized = shardwise.quantize(layer, block=block)
    after = quantized.dequantized()
    assert quantized.weight.dtype == torch.int8 and quantized.scales.shape == (rows, -(-columns // block))
    for at in range(0, columns, block):
        part = slice(at, at + block)
        largest = before[:, part].abs().amax(1, keepdim=True)
        assert ((after - before)[:, part].abs() <= largest / 254 * 1.0001).all()
        top = before[:, part].abs() == largest  # the largest itself is exact, but for the scale's rounding
        assert torch.allclose(after[:, part][top], before[:, part][top], rtol=1e-6, atol=0)


def test_a_layer_computes_with_the_weight_it_stands_for_and_keeps_none_of_it():
    torch.manual_seed(0)
    layer = shardwise.quantize(nn.Linear(40, 24), block=16)
    plain = nn.Linear(40, 24)
    plain.load_state_dict({"weight": layer.dequantized(), "bias": layer.bias})
    a, b = (torch.randn(6, 3, 40, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = layer(a)
    assert sum(t.nbytes for t in kept) <= layer.weight.nbytes + layer.scales.nbytes
    expected = plain(b)
    assert torch.equal(out, expected)
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(a), out)
        assert torch.equal(layer(a[0, 0]), plain(b[0, 0]))
    for y in (out, expected):
        y.square().sum().backward()
    assert torch.equal(a.grad, b.grad) and torch.allclose(layer.bias.grad, plain.bias.grad, rtol=1e-5)
    assert layer.weight.grad is None and layer.scales.grad is None
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(a), F.linear(a.bfloat16(), layer.dequantized(torch.bfloat16), layer.bias.bfloat16()))


def test_moving_and_converting_never_touches_weight_and_scales():
    layer = shardwise.quantize(nn.Linear(40, 24), block=16)
    before = whole(layer)
    for change in (
        nn.Module.half,
        nn.Module.double,
        lambda m: m.to("cpu", torch.bfloat16),
        copy.deepcopy,
        nn.Module.cpu,
    ):
        layer = change(layer)
        assert torch.equal(layer.weight, before["weight"]) and torch.equal(layer.scales, before["scales"])
    assert layer.bias.dtype == torch.bfloat16 and layer(torch.ones(1, 40).bfloat16()).dtype == torch.bfloat16
    meta = copy.deepcopy(layer).to("meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"} and meta.scales.dtype == torch.float32
    with pytest.raises(UnitError, match="int8 weight cannot become"):
        layer.type(torch.float16)
    layer.scales.requires_grad_(True)
    with pytest.raises(UnitError, match="not trained"):
        layer(torch.ones(1, 40))


def test_a_float_weight_is_quantised_when_it_is_loaded_and_an_int8_one_is_not_again():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3))
    model = shardwise.quantize(copy.deepcopy(plain))
    other = shardwise.quantize(nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3)))
    other.load_state_dict(plain.state_dict())
    assert_same(whole(other), whole(model))
    before = whole(model)
    assert shardwise.quantize(model) is model  # as it is
    model.load_state_dict(before)
    assert_same(whole(model), before)
    with pytest.raises(RuntimeError, match=r"Missing key.*scales"):
        model.load_state_dict({k: v for k, v in before.items() if "scales" not in k})


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 8)
        self.once = nn.Linear(8, 8)
        self.again = self.once
        self.attention = nn.MultiheadAttention(8, 2)  # uses the weight of a subclass of nn.Linear itself
        self.head = nn.Linear(8, 9, bias=False)
        self.head.weight = self.table.weight


def test_what_is_left_as_it_is():
    model = shardwise.quantize(Shared())
    assert isinstance(model.once, QuantizedLinear) and model.again is model.once
    assert type(model.head) is nn.Linear and model.head.weight is model.table.weight
    assert not isinstance(model.attention.out_proj, QuantizedLinear)
    config = transformers.LlamaConfig(**SMALL)
    model = shardwise.quantize(transformers.LlamaForCausalLM(config))
    assert type(model.lm_head) is nn.Linear and isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    model = shardwise.quantize(transformers.LlamaForCausalLM(config), skip=["mlp", "model.layers.0"])
    assert isinstance(model.lm_head, QuantizedLinear) and type(model.model.layers[1].mlp.up_proj) is nn.Linear
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert isinstance(model.model.layers[1].self_attn.q_proj, QuantizedLinear)
    model = shardwise.quantize(transformers.LlamaForCausalLM(config), skip="lm_head")
    assert type(model.lm_head) is nn.Linear
    with pytest.raises(UnitError, match="skip names 'lm_haed'") as error:
        shardwise.quantize(model, skip=["lm_haed"])
    assert "lm_head" in str(error.value)
    for wrong in (nn.Embedding(3, 3), nn.Sequential(nn.Conv1d(1, 1, 1))):
        with pytest.raises(UnitError, match=r"no nn\.Linear"):
            shardwise.quantize(wrong)
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises(UnitError, match="0: infinite or NaN"):
        shardwise.quantize(nn.Sequential(layer))
    with pytest.raises(UnitError, match="power of two"):
        shardwise.quantize(nn.Linear(2, 2), block=48)


# --- models that run ----------------------------------------------------------------------------------
SMALL = {"vocab_size": 100, "hidden_size": 72, "num_hidden_layers": 4, "num_attention_heads": 4,
         "intermediate_size": 300, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


def llama(**more):
    torch.manual_seed(3)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | more)).eval()


def ids(seed=0) -> torch.Tensor:
    return torch.randint(5, 95, (2, 7), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def said(model, seed=0):
    """Tokens and logits."""
    tokens = model.generate(ids(seed), max_new_tokens=5, do_sample=False, pad_token_id=0)
    return tokens, model(ids(seed)).logits


def assert_says(model, expected, seed=0):
    for mine, theirs in zip(said(model, seed), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A folder in bf16, one made of it in int8."""
    root = tmp_path_factory.mktemp("quantized")
    llama().bfloat16().save_pretrained(root / "full", max_shard_size="200KB")
    (root / "full" / "tokenizer.json").write_text("{}")
    out = shardwise.quantize_checkpoint(root / "full", root / "int8", max_shard_size="100KB", progress=False)
    return {"full": root / "full", "int8": out}


def in_memory(folders) -> nn.Module:
    """Plain torch modules with the quantised weights."""
    return shardwise.quantize(transformers.LlamaForCausalLM.from_pretrained(folders["full"]).eval())


def placed(folder: str, where: str) -> dict:
    """Arguments of load."""
    maps = {
        "auto": {}, "disk": {"device_map": {"": "disk"}}, "split": {"device_map": "split"},
        "half": {"max_memory": {"cpu": 600_000 if folder == "int8" else 780_000}, "length": 8},
    }  # fmt: skip
    return maps[where] | ({"quantization": "int8"} if folder == "full" else {})


@pytest.mark.parametrize(
    ("folder", "where"), [("int8", "auto"), ("int8", "disk"), ("int8", "half"), ("int8", "split"), ("full", "auto")]
)
def test_outputs_are_those_of_the_quantised_model_in_memory(folders, folder, where):
    model = in_memory(folders)
    loaded = shardwise.load(folders[folder], **placed(folder, where))
    assert_says(loaded, said(model))
    assert_same(whole(loaded), whole(model))
    homes = set(loaded.shardwise_plan.homes.values())
    assert homes == {"auto": {"device"}, "disk": {"nvme"}, "half": {"device", "nvme"}, "split": {"device"}}[where]
    assert_says(copy.deepcopy(loaded), said(model))


def loads_on_ranks(folder, kw):
    loaded = shardwise.load(folder, **kw)
    homes = set(loaded.shardwise_plan.homes.values())
    with shardwise.together(loaded):
        return said(loaded, rank()), homes, whole(loaded)


@pytest.mark.parametrize(("folder", "where"), [("int8", "split"), ("int8", "disk"), ("full", "split")])
def test_two_ranks_say_the_same(folders, folder, where):
    model = in_memory(folders)
    results = run(2, loads_on_ranks, folders[folder], placed(folder, where))
    for r, (answer, homes, state) in enumerate(results):
        assert all(torch.equal(a, b) for a, b in zip(answer, said(model, r), strict=True))
        assert homes == ({"device"} if where == "split" else {"nvme"})
        assert_same(state, whole(model))


def test_weights_in_full_precision_are_not_quantised_for_each_use(folders):
    with pytest.raises(OffloadError, match="quantize_checkpoint"):
        shardwise.load(folders["full"], **placed("full", "disk"))
    with pytest.raises(OffloadError, match="quantize_checkpoint"):
        shardwise.load(folders["full"], **placed("full", "half"))
    with pytest.raises(UnitError, match="int4"):
        shardwise.load(folders["full"], quantization="int4")


def read_by(model) -> int:
    files = next(b for u in engine_of(model).units for b in u.buckets).reading.files

    def run() -> None:
        with torch.no_grad():
            model(ids())
        while files._queue.active:  # what is read ahead for the next one counts with this one
            time.sleep(0.001)

    run()
    run()
    files.reset_stats()
    run()
    return files.stats.bytes_read


def test_half_the_bytes_stream_and_twice_as_much_fits(tmp_path, monkeypatch):
    llama(hidden_size=512, intermediate_size=1024, num_hidden_layers=12).bfloat16().save_pretrained(tmp_path / "full")
    shardwise.quantize_checkpoint(tmp_path / "full", tmp_path / "int8", progress=False)
    models = {name: shardwise.load(tmp_path / name, {"": "disk"}, length=8) for name in ("full", "int8")}
    plan = {name: model.shardwise_plan for name, model in models.items()}
    true = sum(p.numel() * p.element_size() for p in models["int8"].parameters())
    assert plan["int8"].total("nvme") == true < 0.54 * plan["full"].total("nvme")
    assert read_by(models["int8"]) < 0.6 * read_by(models["full"])  # with what lies between
    room = plan["full"].device + 4 * plan["full"].nbytes["model.layers.0"]
    fits = {}
    # With the rates of the moment a busy disk may want one unit less, for more room.
    monkeypatch.setattr(planning, "measure", lambda *_: Rates(disk=1e9, link=0.0, short=1e-9, long=1e-11, batch=1))
    for name in ("full", "int8"):
        homes = shardwise.load(tmp_path / name, max_memory={"cpu": room}, length=8).shardwise_plan.homes
        fits[name] = sum(at == "device" for unit, at in homes.items() if unit)
    assert fits["full"] == 4 and fits["int8"] >= 8


def test_a_folder_in_int8_says_so_and_is_not_quantised_again(folders, tmp_path):
    config = json.loads((folders["int8"] / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "shardwise_int8"}
    assert (folders["int8"] / "tokenizer.json").exists() and len(list(folders["int8"].glob("*.safetensors"))) > 1
    assert_says(shardwise.load(folders["int8"], quantization="int8"), said(in_memory(folders)))
    with pytest.raises(CheckpointError, match="quantised already"):
        shardwise.quantize_checkpoint(folders["int8"], tmp_path / "twice")
    with pytest.raises(UnitError, match="power of two"):
        shardwise.quantize_checkpoint(folders["full"], tmp_path / "odd", block=100)
    with pytest.raises(CheckpointError, match="not empty"):
        shardwise.quantize_checkpoint(folders["full"], folders["int8"])
    loaded = shardwise.load(folders["full"], quantization="int8", dtype="float32")
    assert loaded.dtype == torch.float32 and loaded.model.layers[0].mlp.up_proj.scales.dtype == torch.float32
    loaded.save_pretrained(tmp_path / "again")
    assert_says(shardwise.load(tmp_path / "again", {"": "disk"}), said(in_memory(folders).float()))


def test_any_module_and_its_checkpoint(tmp_path):
    model = make(odd=False)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    folder = shardwise.quantize_checkpoint(
        make(odd=False), tmp_path / "int8", checkpoint=tmp_path / "weights.pt", block=8
    )
    expected = shardwise.quantize(model, block=8)(batch(0, 0))
    with torch.device("meta"):
        made = [make(odd=False) for _ in range(3)]
    assert torch.equal(shardwise.load(made[0], {"": "disk"}, checkpoint=folder)(batch(0, 0)), expected)
    torch.save(model.state_dict(), tmp_path / "int8.pt")
    assert torch.equal(shardwise.load(made[1], checkpoint=tmp_path / "int8.pt")(batch(0, 0)), expected)
    arrived = shardwise.load(made[2], checkpoint=tmp_path / "weights.pt", quantization="int8")(batch(0, 0))
    assert torch.equal(arrived, shardwise.quantize(make(odd=False))(batch(0, 0)))


@pytest.mark.parametrize("where", ["disk", "cpu"])
def test_a_quantised_model_in_memory_is_dispatched(tmp_path, where):
    model = shardwise.quantize(llama())
    expected = said(model)
    shardwise.dispatch_model(model, {"model.layers.1": "cpu", "": where}, offload_dir=tmp_path)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    assert_says(model, expected)


class Narrow(nn.Module):
    """A weight in fp8 with a scale beside it, as many authors publish them."""

    def __init__(self, kind: str = "float8_e4m3fn") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64).to(getattr(torch, kind)), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"])
def test_fp8_is_counted_at_its_true_size_and_read_as_it_is(tmp_path, kind):
    model = nn.Sequential(*(Narrow(kind) for _ in range(3)))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        other = nn.Sequential(*(Narrow(kind) for _ in range(3)))
    loaded = shardwise.load(other, {"": "disk"}, checkpoint=tmp_path / "model.safetensors")
    assert sum(loaded.shardwise_plan.nbytes.values()) == 3 * (64 * 64 + 4)
    x = torch.randn(2, 64)
    assert torch.equal(loaded(x), model(x))
    assert all(p.dtype == getattr(torch, kind) for n, p in loaded.named_parameters() if "weight" in n)


def on_an_accelerator(folders):
    plain = in_memory(folders).to("sim:0")
    homes, same = [], []
    for folder, kw in (
        ("full", {"quantization": "int8"}),
        ("full", {"quantization": "int8", "max_memory": {0: 1_000_000, "cpu": 2_000_000}, "length": 8}),
        ("int8", {"max_memory": {0: 600_000, "cpu": 2_000_000}, "length": 8}),
        ("int8", {"max_memory": {0: 600_000, "cpu": 0}, "length": 8}),
    ):
        loaded = shardwise.load(folders[folder], **kw)
        homes.append(set(loaded.shardwise_plan.homes.values()))
        with torch.no_grad():
            same.append(torch.equal(loaded(ids().to("sim:0")).logits, plain(ids().to("sim:0")).logits))
    return homes, same


def test_on_an_accelerator_from_its_memory_the_hosts_and_the_disk(folders):
    homes, same = run(1, on_an_accelerator, folders, device="sim")[0]
    assert all(same), same
    assert homes == [{"device"}, {"device", "cpu"}, {"device", "cpu"}, {"device", "nvme"}]


# --- training beside them -----------------------------------------------------------------------------
class Adapter(nn.Module):
    """A low-rank update of a frozen layer."""

    def __init__(self, base: nn.Linear, r: int = 3) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(r, base.in_features) / 4)
        self.b = nn.Parameter(torch.zeros(base.out_features, r))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a), self.b)


def qlora(**kw):
    model = make(**kw).requires_grad_(False)
    shardwise.quantize(model, block=8)
    for block in model.blocks:
        block.up, block.down = Adapter(block.up), Adapter(block.down)
    return model


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def trains(strategy, changes, all_of_them=False):
    model = qlora()
    shardwise.fully_shard(model, strategy=shardwise.Strategy.parse(strategy).replace(**changes))
    optimizer = sgd(model.parameters() if all_of_them else [p for p in model.parameters() if p.requires_grad])
    losses = []
    for step in range(3):
        loss = loss_of(model, batch(step, rank()))
        loss.backward()
        shardwise.clip_grad_norm_(model, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    kinds = {str(b.dtype) for u in engine_of(model).units for b in u.buckets}
    return losses, whole(model), kinds


@pytest.mark.parametrize("size", [1, 2])
def test_adapters_train_alike_under_every_preset(size):
    results = run(size, trains, "ddp", {})
    for strategy in ("zero1", "zero2", "zero3", "hsdp"):
        for (losses, state, _), (others, other, _) in zip(results, run(size, trains, strategy, {}, True), strict=True):
            assert losses == others
            assert_same(state, other)
    for (losses, state, _), (others, other, _) in zip(
        results, run(size, trains, "zero3", {"offload_params": "cpu", "offload_optimizer": "cpu"}), strict=True
    ):
        assert losses == others
        assert_same(state, other)
    alone = qlora()
    before = whole(alone)
    optimizer = sgd([p for p in alone.parameters() if p.requires_grad])
    for step in range(3):
        loss_of(alone, torch.cat([batch(step, r) for r in range(size)])).backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert_close(whole(alone), results[0][1])
    frozen = {k for k, p in alone.named_parameters() if not p.requires_grad}
    assert_same({k: results[0][1][k] for k in frozen}, {k: before[k] for k in frozen})


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_mixed_precision_casts_neither_weights_nor_scales(dtype):
    results = {s: run(2, trains, s, {"param_dtype": dtype})[0] for s in ("ddp", "zero3")}
    (losses, state, kinds), (others, other, _) = results.values()
    assert losses == others
    assert_same(state, other)
    assert kinds == {"torch.int8", "torch.float32", {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[dtype]}
    expected = whole(qlora())
    assert_same({k: state[k] for k in state if "base" in k}, {k: expected[k] for k in state if "base" in k})


def gathers(strategy):
    """Bytes of a forward's gathers, and what the frozen parameters of units hold here."""
    model = qlora()
    shardwise.fully_shard(model, strategy=strategy)
    shardwise.reset_stats()
    with torch.no_grad():
        loss_of(model, batch(0, rank()))
    sent = shardwise.stats(model).comm["gather"].bytes_sent
    buckets = [b for u in engine_of(model).units for b in u.buckets]
    whole_bytes = sum(b.layout.numel * b.dtype.itemsize for b in buckets)
    int8 = sum(b.layout.numel for b in buckets if b.dtype == torch.int8)
    return sent, whole_bytes, int8, sum(b.master.nbytes for b in buckets if b.dtype == torch.int8)


def test_int8_weights_are_sharded_and_gathered_as_bytes():
    model = qlora()
    true = sum(p.numel() for p in model.parameters() if p.dtype == torch.int8)
    for sent, whole_bytes, int8, held in run(2, gathers, "zero3"):
        assert sent == whole_bytes // 2  # each rank sends its half of all values, once
        assert true <= int8 <= true * 1.1 and held == int8 // 2


def steps(strategy):
    model = shardwise.fully_shard(qlora(), strategy=strategy)
    optimizer = sgd(model.parameters())
    for step in range(2):  # what later steps send
        shardwise.reset_stats()
        loss_of(model, batch(step, rank())).backward()
        optimizer.step()
        optimizer.zero_grad()
    sent = sum(c.bytes_sent for kind, c in shardwise.stats(model).comm.items() if kind in ("gather", "reduce"))
    return sent, shardwise.expected(model).sent_per_step


def test_the_bytes_of_a_step_are_the_formula():
    for strategy in ("ddp", "zero3"):
        for sent, expected in run(2, steps, strategy):
            assert sent == expected


def on_a_device(changes):
    torch.manual_seed(0)
    model = qlora().to("sim:0")
    shardwise.fully_shard(model, strategy=shardwise.Strategy.parse("zero3").replace(**changes))
    optimizer = sgd(model.parameters())
    losses = []
    for step in range(2):
        loss = loss_of(model, batch(step, rank()).to("sim:0"))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {k: v.cpu() for k, v in whole(model).items()}


def test_from_host_memory_and_disk_to_a_device(tmp_path):
    results = [
        run(2, on_a_device, changes, device="sim")[0]
        for changes in (
            {}, {"offload_params": "cpu"}, {"offload_params": "nvme", "nvme_path": str(tmp_path), "param_dtype": None},
        )
    ]  # fmt: skip
    for losses, state in results[1:]:
        assert losses == results[0][0]
        assert_same(state, results[0][1])


def saves_and_resumes(folder):
    accelerator = Accelerator(cpu=True, strategy="zero3", mixed_precision="bf16")
    model = qlora()
    model, optimizer = accelerator.prepare(model, adamw(model.parameters()))

    def step(index):
        loss = loss_of(model, batch(index, rank()))
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    step(0)
    accelerator.save_state(folder / "state")
    accelerator.save_model(model, folder / "model")
    before = whole(model)
    first = step(1)
    accelerator.load_state(folder / "state")
    with shardwise.gathered(model):
        assert model.blocks[0].up.base.weight.dtype == torch.int8
    assert_same(whole(copy.deepcopy(model)), before)
    return before, first, step(1)


def resumes_elsewhere(folder, strategy):
    model = shardwise.fully_shard(qlora(seed=5), strategy=strategy)
    shardwise.checkpoint.load_model(model, folder / "model")
    return whole(model)


def test_checkpoints_hold_them_as_they_are(tmp_path):
    before, first, again = run(2, saves_and_resumes, tmp_path)[0]
    assert first == again and before["blocks.0.up.base.weight"].dtype == torch.int8
    assert_same(run(2, resumes_elsewhere, tmp_path, "zero1")[0], before)
    assert_same(run(1, resumes_elsewhere, tmp_path, "zero3")[0], before)
    plain = qlora(seed=5)
    shardwise.checkpoint.load_model(plain, tmp_path / "model")
    assert_same(whole(plain), before)


def layers():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(24, 40), nn.Sequential(nn.ReLU(), nn.Linear(40, 9)))


def made_on_meta(strategy):
    with torch.device("meta"):
        model = shardwise.quantize(layers(), block=16)
    torch.manual_seed(1)
    return whole(shardwise.fully_shard(model, strategy=strategy, units=[nn.Sequential]))


def test_a_model_on_the_meta_device_gets_the_values_of_one_in_memory():
    assert_same(run(2, made_on_meta, "zero3")[0], whole(shardwise.quantize(layers(), block=16)))


def loads_on_meta(folder):
    with torch.device("meta"):
        model = shardwise.quantize(llama())
    shardwise.fully_shard(model, strategy="zero3")
    shardwise.checkpoint.load_model(model, folder)
    with torch.no_grad():
        return model.eval()(ids()).logits


def test_a_model_on_the_meta_device_gets_the_values_of_a_folder_in_int8(folders):
    expected = in_memory(folders).float()(ids()).logits
    for logits in run(2, loads_on_meta, folders["int8"]):
        assert torch.equal(logits, expected)


def peft_model():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = shardwise.quantize(llama())
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.0, init_lora_weights="gaussian")
    return peft.get_peft_model(model, config)


def trains_peft(strategy):
    model = peft_model()
    accelerator = Accelerator(cpu=True, strategy=strategy)
    model, optimizer = accelerator.prepare(model, sgd([p for p in model.parameters() if p.requires_grad]))
    for step in range(2):
        tokens = ids(10 * step + rank())
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
    return whole(model)


def test_peft_adapts_them():
    states = [run(2, trains_peft, strategy)[0] for strategy in ("ddp", "zero3")]
    assert_same(*states)
    moved = [k for k, v in whole(peft_model()).items() if not torch.equal(v, states[0][k])]
    assert moved and all("lora_" in k for k in moved)
