"""DeepSpeed's optimizers: the numbers of their papers and of DeepSpeed, under every strategy."""

from __future__ import annotations

import importlib
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import shardwise
from models import PRESETS, assert_same, batch, loss_of, make, rank
from ranks import run
from scenarios import LM, compare
from shardwise.deepspeed.ops import build_optimizer
from shardwise.deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from shardwise.deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from shardwise.deepspeed.ops.lamb import FusedLamb
from shardwise.deepspeed.ops.lion import DeepSpeedCPULion, FusedLion
from shardwise.deepspeed.ops.muon import MuonWithAuxAdam
from shardwise.errors import ConfigError, LeftOut, OptimizerError

STEPS = 5


def gradients(shape: Any = (7, 3)) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(STEPS)]


def start(shape: Any = (7, 3)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def stepped(make_optimizer: Any, shape: Any = (7, 3)) -> torch.Tensor:
    p = nn.Parameter(start(shape))
    optimizer = make_optimizer([p])
    for g in gradients(shape):
        p.grad = g.clone()
        optimizer.step()
        assert torch.equal(p.grad, g)  # gradients are the script's
        optimizer.zero_grad()
        assert p.grad is None
    return p.detach()


# --- by the formulas of the papers, in float64 -----------------------------------------------------------
def adam(decoupled: bool, corrected: bool, decay: float = 0.1, lr: float = 0.01, eps: float = 1e-8) -> torch.Tensor:
    p, m, v = start(), 0.0, 0.0
    for t, g in enumerate(gradients(), start=1):
        g = g if decoupled else g + decay * p
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        first, second = (m / (1 - 0.9**t), v / (1 - 0.999**t)) if corrected else (m, v)
        p = (p - lr * decay * p if decoupled else p) - lr * first / (second.sqrt() + eps)
    return p


def lion(decay: float = 0.1, lr: float = 0.01) -> torch.Tensor:
    p, m = start(), torch.zeros(7, 3, dtype=torch.float64)
    for g in gradients():
        p = p * (1 - lr * decay) - lr * torch.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
    return p


def lamb(inside: bool, corrected: bool, decay: float = 0.1, lr: float = 0.01) -> torch.Tensor:
    p, m, v = start(), 0.0, 0.0
    for t, g in enumerate(gradients(), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        u = m / ((v + 1e-8).sqrt() if inside else v.sqrt() + 1e-8) + decay * p
        ratio = float((p.norm() / u.norm()).clamp(0.01, 0.7))
        rate = lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) if corrected else lr
        p = p - rate * ratio * u
    return p


@pytest.mark.parametrize("kind", [FusedAdam, DeepSpeedCPUAdam])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("decoupled", [True, False])
def test_adam(kind, corrected, decoupled):
    mode = {"adam_w_mode" if kind is FusedAdam else "adamw_mode": decoupled}
    made = []

    def build(params: Any) -> Any:
        made.append(kind(params, lr=0.01, weight_decay=0.1, bias_correction=corrected, **mode))
        return made[0]

    torch.testing.assert_close(stepped(build), adam(decoupled, corrected), rtol=1e-12, atol=0)
    assert isinstance(made[0], kind) and made[0].param_groups[0]["bias_correction"] is corrected
    (state,) = pickle.loads(pickle.dumps(made[0])).state.values()
    assert float(state["step"]) == STEPS and {"exp_avg", "exp_avg_sq"} < set(state)


def test_the_step_is_that_of_the_settings_whatever_was_made_before(monkeypatch):
    for kind in (FusedAdam, DeepSpeedCPUAdam):  # torch puts its hooked step into the first class it makes
        monkeypatch.setattr(kind, "step", torch.optim.Adam.step)
        found = stepped(lambda p, kind=kind: kind(p, lr=0.01, weight_decay=0.1, bias_correction=False))
        torch.testing.assert_close(found, adam(True, False), rtol=1e-12, atol=0)


def test_lion_and_lamb():
    for kind in (FusedLion, DeepSpeedCPULion):
        found = stepped(lambda p, kind=kind: kind(p, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1))
        torch.testing.assert_close(found, lion(), rtol=1e-12, atol=0)
    still = nn.Parameter(torch.ones(3))
    still.grad = torch.zeros(3)
    FusedLion([still]).step()
    assert torch.equal(still, torch.ones(3))  # the sign of 0 is 0
    for inside, corrected in ((False, True), (True, False)):
        build = {"eps_inside_sqrt": inside, "bias_correction": corrected, "max_coeff": 0.7, "weight_decay": 0.1}
        found = stepped(lambda p, build=build: FusedLamb(p, lr=0.01, **build))
        torch.testing.assert_close(found, lamb(inside, corrected), rtol=1e-12, atol=0)
    zero = nn.Parameter(torch.zeros(3))
    zero.grad = torch.ones(3)
    optimizer = FusedLamb([zero])
    optimizer.step()
    assert optimizer.get_lamb_coeffs() == [1.0] and bool((zero < 0).all())


def test_several_dtypes_groups_and_parameters_without_gradients():
    def params() -> list[nn.Parameter]:
        kinds = (torch.float32, torch.float64, torch.float32, torch.bfloat16)
        return [nn.Parameter(start((4,)).to(kind)) for kind in kinds]

    for kind in (FusedLion, FusedLamb, FusedAdam, lambda p: FusedAdam(p, bias_correction=False)):
        together, alone = params(), params()
        one = kind([{"params": together[:2], "lr": 0.1}, {"params": together[2:], "weight_decay": 0.2}])
        each = [
            kind([{"params": [p], **({"lr": 0.1} if i < 2 else {"weight_decay": 0.2})}]) for i, p in enumerate(alone)
        ]
        for step in range(3):
            for i, p in enumerate((*together, *alone)):
                p.grad = None if i % 4 == step else torch.full((4,), 0.5 + step, dtype=p.dtype)
            one.step()
            for optimizer in each:
                optimizer.step()
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a, b)


# --- Muon --------------------------------------------------------------------------------------------------
class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(2, 6, 3)
        self.up = nn.Linear(4, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 5, bias=False)


def test_muon_takes_matrices_and_decays_no_vectors():
    model = Small()
    optimizer = build_optimizer(
        "Muon", model.parameters(), {"lr": 0.1, "adam_lr": 0.2, "weight_decay": 0.5}, model=model
    )
    names = {p: n for n, p in model.named_parameters()}
    found = [
        ({names[p] for p in g["params"]}, g["use_muon"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups
    ]
    assert found == [
        ({"conv.weight", "up.weight"}, True, 0.1, 0.5),
        ({"wte.weight", "lm_head.weight"}, False, 0.2, 0.5),
        ({"conv.bias", "up.bias", "norm.weight", "norm.bias"}, False, 0.2, 0.0),
    ]
    own = build_optimizer("Muon", [{"params": list(model.parameters()), "weight_decay": 0.3, "name": "a"}], model=model)
    assert [(g["weight_decay"], g["name"]) for g in own.param_groups] == [(0.3, "a")] * 3
    model.up.weight.use_muon = False
    assert len(build_optimizer("muon", model.parameters()).param_groups[0]["params"]) == 3  # no names: embeddings too


def test_muon_is_torchs_and_adam_is_torchs():
    torch.manual_seed(0)
    shapes = [(6, 4), (4, 6), (5,)]
    ours, theirs = ([nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    kernel = nn.Parameter(torch.ones(6, 2, 3, 3).to(memory_format=torch.channels_last))
    flat = nn.Parameter(torch.ones(6, 18))
    optimizer = build_optimizer("Muon", [*ours, kernel], {"lr": 0.05, "weight_decay": 0.1, "betas": [0.9, 0.99]})
    plain = [
        torch.optim.Muon([*theirs[:2], flat], lr=0.05, weight_decay=0.1),
        torch.optim.AdamW(theirs[2:], lr=0.05, betas=(0.9, 0.99), eps=1e-10, weight_decay=0.0),
    ]
    for _ in range(3):
        for a, b in zip((*ours, kernel), (*theirs, flat), strict=True):
            b.grad = torch.randn(b.shape)
            a.grad = b.grad.view(a.shape).clone()
        optimizer.step()
        for other in plain:
            other.step()
    assert_same({str(i): p.detach() for i, p in enumerate(ours)}, {str(i): p.detach() for i, p in enumerate(theirs)})
    assert torch.equal(kernel.detach().flatten(1), flat.detach())
    assert {*optimizer.state[ours[0]]} == {"momentum_buffer"} and "exp_avg" in optimizer.state[ours[2]]


# --- from a configuration ----------------------------------------------------------------------------------
def test_what_a_configuration_names():
    params = [nn.Parameter(torch.ones(2, 2))]
    for name, kwargs, kind, decay in (
        ("Adam", {"lr": 0.1, "betas": [0.8, 0.9]}, FusedAdam, 0.0),
        ("adamw", {"adam_w_mode": False}, FusedAdam, 0.0),
        ("AdamW", {"torch_adam": True, "foreach": True}, torch.optim.AdamW, 0.01),
        ("Adam", {"torch_adam": True, "adam_w_mode": False}, torch.optim.Adam, 0),
        ("Adagrad", {"eps": 1e-8}, DeepSpeedCPUAdagrad, 0),
        ("Lion", {"weight_decay": 0.2}, FusedLion, 0.2),
        ("LAMB", {}, FusedLamb, 0.0),
        ("SGD", {"lr": 0.1, "momentum": 0.9}, torch.optim.SGD, 0),
        ("Muon", {"momentum": 0.9, "ns_method": "gram"}, MuonWithAuxAdam, 0.0),
        ("NAdam", {}, torch.optim.NAdam, 0),
    ):
        optimizer = build_optimizer(name, params, kwargs)
        assert isinstance(optimizer, kind) and optimizer.param_groups[0]["weight_decay"] == decay, name
    assert build_optimizer("Adam", params).adam_w_mode
    assert not build_optimizer("Adam", params, {"adam_w_mode": False}).adam_w_mode
    assert build_optimizer("AdamW", params, {"adam_w_mode": False}).adam_w_mode  # as in DeepSpeed


@pytest.mark.parametrize(
    ("name", "kwargs", "text"),
    [
        ("OneBitAdam", {}, "Adam with communication_data_type bf16"),
        ("ZeroOneAdam", {}, "not sent as signs"),
        ("OneBitLamb", {}, "Lamb with"),
        ("MuAdam", {}, r"initialize\(optimizer="),
        ("AdamV", {}, "did you mean 'Adam"),
        ("Nothing", {}, "build it in the script"),
        ("Adam", {"lr": "auto"}, "lr is 'auto'"),
        ("Adam", {"betas": [0.9, "auto"]}, "betas is 'auto'"),
        ("Adam", {"weigth_decay": 0.1}, "did you mean 'weight_decay'"),
        ("Adam", {"max_grad_norm": 1.0}, "gradient_clipping"),
        ("Adam", {"amsgrad": True}, "AMSGrad"),
        ("Lamb", {"max_grad_norm": 0, "min_coeff": 3.0, "max_coeff": 2.0}, "coefficients"),
        ("Lion", {"lr": -1.0}, "lr=-1"),
        ("Muon", {"momentums": 0.9}, "momentums"),
        ("Muon", {"per_head_muon": True}, "per_head_muon"),
    ],
)
def test_what_is_refused(name, kwargs, text):
    with pytest.raises((ConfigError, OptimizerError), match=text):
        build_optimizer(name, [nn.Parameter(torch.ones(2, 2))], kwargs)


def test_classes_refuse_what_deepspeeds_refuse():
    params = [nn.Parameter(torch.ones(2))]
    for build in (
        lambda: DeepSpeedCPUAdam(params, fp32_optimizer_states=False),
        lambda: DeepSpeedCPUAdagrad(params, amsgrad=True),
        lambda: FusedAdam([{"params": params, "bias_correction": False}]),
        lambda: MuonWithAuxAdam([{"params": params}]),
        lambda: MuonWithAuxAdam([{"params": params, "use_muon": True}]),
        lambda: FusedLamb(params, max_grad_norm=1.0),
    ):
        with pytest.raises((ConfigError, OptimizerError)):
            build()


# --- on ranks ----------------------------------------------------------------------------------------------
ELEMENTWISE: dict[str, dict[str, Any]] = {
    "Adam": {"lr": 0.01, "weight_decay": 0.1},
    "Adagrad": {"lr": 0.05},
    "Lion": {"lr": 0.01, "weight_decay": 0.1},
    "AdamW": {"lr": 0.01, "bias_correction": False},
}


def on_slices() -> None:
    for name, kwargs in ELEMENTWISE.items():
        row = LM("", optimizer=lambda m, n=name, k=kwargs: build_optimizer(n, m.parameters(), k), steps=3, tol=3e-4)
        results = [compare(row, preset, before=i % 2 == 0)[0] for i, preset in enumerate(PRESETS)]
        results.append(compare(row, "zero3,offload_optimizer=nvme")[0])
        for other in results[1:]:
            assert_same(other, results[0])


def test_elementwise_optimizers_are_cut_anywhere():
    run(2, on_slices)


def of_whole_tensors() -> None:
    for name, tol in (("Lamb", 3e-4), ("Muon", 2e-2)):  # Muon orthogonalises in bf16
        row = LM(
            "", optimizer=lambda m, n=name: build_optimizer(n, m.parameters(), {"lr": 0.01}, model=m), steps=3, tol=tol
        )
        results = [compare(row, f"{preset},layout=tensor")[0] for preset in (*PRESETS, "zero2,offload_optimizer=nvme")]
        for other in results[1:]:
            assert_same(other, results[0])
        model = shardwise.fully_shard(make(), strategy="zero3")
        loss_of(model, batch(0, rank())).backward()
        with pytest.raises(OptimizerError, match="layout=tensor"):
            build_optimizer(name, model.parameters(), {"lr": 0.01}, model=model).step()


def test_lamb_and_muon_need_whole_parameters():
    run(2, of_whole_tensors)


# --- beside DeepSpeed's own kernels ------------------------------------------------------------------------
CASES = [
    ("adam", "DeepSpeedCPUAdam", {"bias_correction": corrected, "adamw_mode": decoupled, "weight_decay": 0.1})
    for corrected in (True, False)
    for decoupled in (True, False)
] + [
    ("lion", "DeepSpeedCPULion", {"weight_decay": 0.1}),
    ("adagrad", "DeepSpeedCPUAdagrad", {"weight_decay": 0.1}),
]  # fmt: skip


@pytest.mark.slow  # DeepSpeed compiles its kernels, for minutes; the formulas above are what CI runs
@pytest.mark.parametrize(("module", "name", "settings"), CASES)
def test_the_numbers_of_deepspeeds_kernels(module, name, settings, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    pytest.importorskip("deepspeed")
    weights = []
    for package in ("deepspeed.ops", "shardwise.deepspeed.ops"):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(1000))
        kind = getattr(importlib.import_module(f"{package}.{module}"), name)
        try:
            optimizer = kind([p], lr=0.01, **settings)
        except RuntimeError as error:
            pytest.skip(f"it cannot be built: {error}")
        for _ in range(20):
            p.grad = torch.randn(1000)
            optimizer.step()
        weights.append(p.detach())
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-5)


def test_probes_for_extensions_say_what_works() -> None:
    """Scripts ask before they use an optimizer or a disk; there is never an extension to load."""
    import shardwise.deepspeed as deepspeed
    from shardwise.deepspeed.ops.op_builder import CPUAdamBuilder, TransformerBuilder

    assert CPUAdamBuilder().is_compatible() and deepspeed.ops.__compatible_ops__[CPUAdamBuilder.NAME]
    assert not TransformerBuilder().is_compatible() and not deepspeed.ops.__compatible_ops__["transformer"]
    with pytest.raises(LeftOut, match="cpu_adam"):
        CPUAdamBuilder().load()
    assert not hasattr(deepspeed.ops.op_builder, "NoSuchBuilder")
    parts = (deepspeed.__version_major__, deepspeed.__version_minor__, deepspeed.__version_patch__)
    assert ".".join(map(str, parts)) == deepspeed.__version__
