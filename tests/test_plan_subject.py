"""What MODEL means to the planner: built without memory, shortened, run on the device that it is for."""

from __future__ import annotations

import json
import resource

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwise.comm.world import default_device
from shardwise.device import accelerator
from shardwise.errors import PlanError
from shardwise.plan.kernels import as_on
from shardwise.plan.planned_device import move, use_planned_device
from shardwise.plan.shapes import SHIPPED
from shardwise.plan.shorten import shorten
from shardwise.plan.subject import resolve
from shardwise.utils import clear_device_cache
from slowly import slow_unless

# Elements, as the model cards have them, in thousands of millions.
SIZES = {
    "gpt2": 0.124, "gpt2-xl": 1.558, "llama-1b": 1.236, "llama-8b": 8.030, "llama-70b": 70.554, "llama-405b": 405.853,
    "mistral-7b": 7.248, "qwen3-8b": 8.191, "qwen3-30b-a3b": 30.532, "mixtral-8x7b": 46.703, "gpt-oss-20b": 20.915,
    "bert-large": 0.335, "vit-l": 0.304, "resnet-50": 0.0256, "t5-3b": 2.852, "t5-11b": 11.307,
}  # fmt: skip
# Architectures by their usual configuration, one for each kind of arrangement; the shipped ones come on top.
KINDS = [
    "gpt_neo", "falcon", "gemma3_text", "cohere2", "deepseek_v3", "llama4_text", "bart", "deberta-v2", "convnext",
    "swin",
]  # fmt: skip


def step(subject, device, keep=2, dtype=None):
    """A step of a shortened form; gradients are where their parameters are."""
    with torch.autograd.set_multithreading_enabled(False), FakeTensorMode(allow_non_fake_inputs=True), as_on(device):
        model = subject.build(keep, device=device, dtype=dtype)
        loss = subject.loss(model, subject.inputs(device))
        loss.backward()
        assert loss.ndim == 0 and loss.device == device
        for name, p in model.named_parameters():
            assert not p.requires_grad or p.grad is None or p.grad.device == p.device == device, name
        return model


QUICK = ("gpt2", "mixtral-8x7b", "vit-l", "t5-3b", "resnet-50")


@pytest.mark.parametrize("name", [slow_unless(name in QUICK, name) for name in SHIPPED])
def test_shipped_models_train_and_have_their_size(name):
    pictures = name.startswith(("vit", "resnet"))
    subject = resolve(name, batch=2, seq=None if pictures else 64)
    if name in SIZES:
        assert subject.parameters / 1e9 == pytest.approx(SIZES[name], rel=0.005)
    assert subject.tokens == (2 if pictures else 128)
    assert subject.routed == name.startswith(("mixtral", "gpt-oss", "qwen3-30b"))
    assert subject.routed == any("even routing" in note for note in subject.notes)
    step(subject, use_planned_device())


@pytest.mark.parametrize("kind", [slow_unless(kind in ("gpt_neo", "bart", "convnext"), kind) for kind in KINDS])
def test_other_architectures_train_on_both_devices(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    subject = resolve(str(tmp_path), batch=2)
    assert any("is assumed" in note for note in subject.notes)  # the file names no architecture
    for device in (torch.device("cpu"), use_planned_device()):
        step(subject, device)


def test_nothing_is_allocated():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(resolve("llama-8b", seq=8192), use_planned_device(), keep=None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB: less than 1 GiB for 32 GB


class Block(nn.Module):
    def __init__(self, width, place, rate=0.0):
        super().__init__()
        self.layer_idx, self.rate = place, rate
        self.linear = nn.Linear(8, width)
        self.back = nn.Linear(width, 8)

    def forward(self, x):
        return x + self.back(self.linear(x))


class Model(nn.Module):
    def __init__(self, widths, shared=False):
        super().__init__()
        self.num_layers = len(widths)
        self.blocks = nn.ModuleList(Block(w, i, 0.1 * (i + 1)) for i, w in enumerate(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in widths)
        if shared:
            for block in self.blocks:
                block.linear.weight = self.blocks[0].linear.weight
        self.pair = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])

    def forward(self, x):
        for i in range(self.num_layers):
            x = self.norms[i](self.blocks[i](x))
        return self.pair[1](self.pair[0](x))


def test_runs_of_equal_blocks_are_cut_and_counted():
    model = Model([8, 16, 8, 16, 8, 16, 8])
    kinds = shorten(model, 2)
    assert [(k.name, k.block, k.count, k.kept) for k in kinds] == [
        ("blocks#0", "Block", 4, 2),
        ("blocks#1", "Block", 3, 2),
    ]
    assert [b.linear.out_features for b in model.blocks] == [8, 16, 8, 16] and model.num_layers == 4
    assert [b.layer_idx for b in model.blocks] == [0, 1, 2, 3] and len(model.norms) == 4
    assert model(torch.randn(2, 8)).shape == (2, 4)
    one = Model([8, 16, 8, 16, 8])
    assert [k.kept for k in shorten(one, {"blocks#0": 1})] == [1, 2] and one(torch.randn(2, 8)).shape == (2, 4)


def test_shared_blocks_stay_shared_and_other_models_stay_as_they_are():
    model = Model([8] * 5, shared=True)
    assert [(k.count, k.kept) for k in shorten(model, 3)] == [(5, 3)]
    assert model.blocks[2].linear.weight is model.blocks[0].linear.weight
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    assert shorten(plain, 1) == () and len(plain) == 3
    with pytest.raises(ValueError, match="1 or more"):
        shorten(model, 0)


def test_moving_keeps_ties_layouts_and_buffers():
    model = Model([8, 8], shared=True)
    model.register_buffer("scale", torch.ones(3, dtype=torch.float64))
    model.pair[0].weight = nn.Parameter(torch.zeros(8, 8).t(), requires_grad=False)
    with FakeTensorMode():
        moved = move(model, use_planned_device(), torch.bfloat16)
    assert moved is model and model.blocks[0].linear.weight is model.blocks[1].linear.weight
    assert model.blocks[0].linear.weight.dtype == torch.bfloat16 and model.scale.device.type == "planned"
    assert model.pair[0].weight.stride() == (1, 8) and not model.pair[0].weight.requires_grad


def test_a_plan_leaves_this_process_its_device():
    device = use_planned_device()
    with as_on(device):
        assert torch.accelerator.is_available()
    assert accelerator() != "planned" and default_device().type != "planned"
    clear_device_cache()
    # What torch itself asks for an accelerator: a loader that pins for it, a module that copies itself to all of them.
    loader = torch.utils.data.DataLoader([torch.ones(2)], pin_memory=True)
    assert next(iter(loader)).sum() == 2
    assert nn.DataParallel(nn.Linear(2, 2))(torch.ones(1, 2)).shape == (1, 2)


def test_adapters_are_what_trains():
    pytest.importorskip("peft")
    subject = resolve("llama-8b", seq=64, lora="r=16,alpha=32")
    assert subject.trainable == 32 * 16 * (4096 + 4096 + 4096 + 1024)  # q_proj and v_proj
    model = step(subject, use_planned_device())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


WRITTEN = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        rates = [x for x in torch.linspace(0, 0.1, 6).tolist()]
        self.blocks = nn.Sequential(*[nn.Sequential(nn.Linear(2048, 2048), nn.Dropout(r)) for r in rates])
    def forward(self, x):
        return self.blocks(x)

def plain():
    return Net(), torch.randn(4, 2048)

def sized(batch=2, seq=8):
    return Net(), {"x": torch.randn(batch, seq, 2048)}, lambda model, inputs: model(**inputs).square().mean()

def nothing():
    return 3

def raising():
    raise KeyError("no such thing")

class Picks(nn.Linear):
    def forward(self, x):
        return super().forward(x)[x.sum(-1) > 0]

def picks():
    return Picks(8, 8), torch.randn(4, 8)

number = 3
"""


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(WRITTEN)
    return path


def test_functions_are_models(written):
    device = use_planned_device()
    plain = resolve(f"{written}:plain", batch=16)
    assert (plain.batch, plain.seq, plain.parameters) == (16, None, 6 * (2048 * 2048 + 2048))
    step(plain, device)
    sized = resolve(f"{written}:sized", batch=3, seq=5)
    with FakeTensorMode():
        assert sized.inputs()["x"].shape == (3, 5, 2048)
    step(sized, torch.device("cpu"))
    with pytest.raises(PlanError, match=r"mine\.py, line 27 asks for them"):
        step(resolve(f"{written}:picks"), device)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("lama-8b", "did you mean 'llama-8b'"),
        ("nowhere:function", "cannot be imported"),
        ("{file}:plian", "did you mean 'plain'"),
        ("{file}:nothing", "returns int"),
        ("{file}:raising", "no such thing"),
        ("{file}:number", "is no function"),
        ("{file}.py:plain", "there is no file"),
        ("{folder}", "no config.json"),
        ("{file}", "not a configuration"),
    ],
)
def test_models_that_are_none_are_one_error(written, model, said):
    with pytest.raises(PlanError) as caught:
        resolve(model.format(file=written, folder=written.parent))
    assert said in str(caught.value) and len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "names no model"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "llama", "architectures": ["LamaForCausalLM"]}, "did you mean 'LlamaForCausalLM'"),
        ({"model_type": "llama", "hidden_size": "wide"}, "refuses"),
        ([1], "holds no keys"),
    ],
)
def test_configurations_that_are_none_are_one_error(tmp_path, values, said):
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(PlanError, match=said):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 0}, "batch must be 1"),
        ({"seq": -1}, "seq must be 1"),
        ({"seq": 5000}, "at most 1024"),
        ({"lora": "rank=3"}, "did you mean|no 'rank'"),
        ({"lora": "r=none"}, "no whole number"),
        ({"lora": "r=0"}, "1 or more"),
    ],
)
def test_contradictions_are_one_error(options, said):
    with pytest.raises(PlanError, match=said):
        resolve("gpt2", **options)
    with pytest.raises(PlanError, match="no length"):
        resolve("vit-b", seq=3)
