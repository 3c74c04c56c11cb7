"""What is planned under ``torch.autocast`` for an accelerator: the dtypes that its kernels would compute and keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shardwise
from ranks import run
from shardwise.plan import planned_autocast
from shardwise.plan.kernels import as_on
from shardwise.plan.machine import Machine
from shardwise.plan.planned_device import use_planned_device
from shardwise.plan.prediction import Training, prediction
from shardwise.plan.subject import resolve

BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
ROWS, WIDTH = 4096, 128


def layers():
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)])


def in_fp32(batch=ROWS):
    return layers(), torch.zeros(batch, WIDTH), lambda model, x: model(x).float().sum()


def under_autocast(batch=ROWS):
    """As scripts write it, for the device that they were written for."""

    def loss(model, x):
        with torch.autocast("cuda", BF16):
            return model(x).float().sum()

    return layers(), torch.zeros(batch, WIDTH), loss


def under_its_own(batch=ROWS):
    def loss(model, x):
        with torch.autocast(x.device.type, BF16):
            return model(x).float().sum()

    return layers(), torch.zeros(batch, WIDTH), loss


def cast(batch=ROWS):
    return layers().to(BF16).to("cpu"), torch.zeros(batch, WIDTH, dtype=BF16), lambda model, x: model(x).float().sum()


def dtypes_of_torchs_reference():
    """By https://docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-autocast-to-float16, and the sections after it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    device = use_planned_device()
    with FakeTensorMode(), as_on(device):
        x = torch.empty(2, 4, 8, 8, device=device)
        half = x.to(BF16)
        weight = nn.Parameter(torch.empty(8, 8, device=device))
        double = torch.empty(8, 8, device=device, dtype=torch.float64)
        assert F.linear(x, weight).dtype == FP32
        with torch.autocast(device.type, BF16):
            found = {
                "linear": F.linear(x, weight), "matmul": x @ x, "conv2d": F.conv2d(x, x.new_empty(3, 4, 1, 1)),
                "attention": F.scaled_dot_product_attention(x, x, half), "layer_norm": F.layer_norm(half, (8,)),
                "rms_norm": F.rms_norm(half, (8,)), "softmax": half.softmax(-1), "sum": half.sum(),
                "sum in": half.sum(dtype=BF16), "exp": half.exp(), "gelu": F.gelu(half), "add": half + x,
                "widest": torch.addcmul(half, half, x), "low": torch.addcmul(half, half, half),
                "double": double @ double,
                "cross_entropy": F.cross_entropy(half[0, 0], torch.zeros(8, dtype=torch.long, device=device)),
            }  # fmt: skip
            assert F.linear(x, weight).dtype == BF16 and len(planned_autocast._casts) == 1  # kept, as torch keeps it
            with torch.autocast(device.type, enabled=False):
                assert (x @ x).dtype == FP32
        assert not planned_autocast._casts
        assert F.linear(x, weight).dtype == FP32
        return {name: value.dtype for name, value in found.items()}


def test_operators_compute_in_the_dtypes_that_torchs_reference_names():
    low = dict.fromkeys(("linear", "matmul", "conv2d", "attention", "sum in", "gelu", "low"), BF16)
    wide = dict.fromkeys(
        ("layer_norm", "rms_norm", "softmax", "sum", "exp", "add", "widest", "cross_entropy"), FP32
    )  # fmt: skip
    assert run(1, dtypes_of_torchs_reference)[0] == low | wide | {"double": torch.float64}


def test_every_name_in_the_lists_is_one_for_which_torch_has_a_rule():
    known = torch._C._dispatch_get_registrations_for_dispatch_key("AutocastCUDA")
    names = {full.removeprefix("aten::").partition(".")[0] for full in known}
    later = {"linalg_vecdot", "_scaled_dot_product_flash_attention"}  # not in the oldest torch
    for listed in (planned_autocast._LOW, planned_autocast._WIDEST, planned_autocast._RESULT):
        assert listed - names <= later


def planned(name, machine="1xA100-40GB", **strategy):
    return prediction(
        Training(resolve(f"test_plan_autocast:{name}", batch=ROWS), "sgd", 1, None),
        Machine.parse(machine),
        shardwise.Strategy("ddp", **strategy),
    )


@pytest.mark.parametrize("machine", ["1xA100-40GB", "1xcpu"])
def test_a_model_that_its_function_has_cast_keeps_half(machine):
    whole, half = (run(1, planned, name, machine)[0] for name in ("in_fp32", "cast"))
    assert half.between["parameters"] == whole.between["parameters"] / 2 == 4 * WIDTH * WIDTH * 2


def test_bytes_are_those_of_torchs_own_autocast():
    """Where the CPU has the same rules: of products of matrices. There torch itself casts."""
    plain, mixed, own = (run(1, planned, name)[0] for name in ("in_fp32", "under_autocast", "under_its_own"))
    on_cpu = run(1, planned, "under_its_own", "1xcpu")[0]
    assert mixed.device.states == own.device.states == on_cpu.device.states
    assert mixed.device.nbytes < plain.device.nbytes and mixed.between == plain.between
    assert run(1, planned, "in_fp32")[0].device.nbytes == plain.device.nbytes  # nothing of it is left behind
