"""What a step keeps for its backward on a planned accelerator: the tensors of CUDA's kernels, by their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from shardwise.plan.kernels import as_on
from shardwise.plan.planned_device import use_planned_device

B, H, S, D = 2, 4, 48, 32
CPU = torch.device("cpu")


def kept(run, device=None):
    """Bytes of all storages that autograd keeps of ``run(make)``, and whether its backward works."""
    device = device or use_planned_device()
    found = {}

    def keep(tensor):
        found[id(tensor.untyped_storage())] = tensor.untyped_storage()  # alive, so that ids stay apart
        return tensor

    def make(*shape, dtype=torch.float32, grad=True):
        return torch.zeros(*shape, dtype=dtype, device=device, requires_grad=grad)

    with torch.autograd.set_multithreading_enabled(False), FakeTensorMode(), as_on(device):
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            out = run(make)
        out.sum().backward()
        return sum(storage.nbytes() for storage in found.values())


def attention(dtype, mask=None, kv=H, **more):
    def run(make):
        q, k, v = make(B, H, S, D, dtype=dtype), make(B, kv, S, D, dtype=dtype), make(B, kv, S, D, dtype=dtype)
        return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask(make), **more)

    return run


@pytest.mark.parametrize(
    ("run", "nbytes"),
    [
        # q, k, v and the result; a logarithm in fp32 per row and head; two numbers of the random state.
        (attention(torch.bfloat16, is_causal=True), 4 * B * H * S * D * 2 + B * H * S * 4),
        (attention(torch.float16, dropout_p=0.1), 4 * B * H * S * D * 2 + B * H * S * 4),
        (attention(torch.bfloat16, kv=2, enable_gqa=True), 2 * B * (H + 2) * S * D * 2 + B * H * S * 4),
        # The other kernel has rows of these logarithms in multiples of 32.
        (attention(torch.float32, is_causal=True), 4 * B * H * S * D * 4 + B * H * 64 * 4),
        (
            attention(torch.bfloat16, lambda make: make(B, 1, S, S, dtype=torch.bfloat16, grad=False)),
            4 * B * H * S * D * 2 + B * H * 64 * 4 + B * S * S * 2,
        ),
        # A mask of yes and no is made one to add, in the dtype of the heads.
        (
            attention(torch.bfloat16, lambda make: make(1, 1, S, S, dtype=torch.bool, grad=False)),
            4 * B * H * S * D * 2 + B * H * 64 * 4 + S * S * 2,
        ),
    ],
)
def test_attention_keeps_what_cudas_kernels_keep(run, nbytes):
    assert nbytes <= kept(run) <= nbytes + 64


def test_attention_that_no_kernel_takes_keeps_its_probabilities():
    masked = attention(torch.float32, lambda make: make(1, 1, S, S, grad=False), kv=2, enable_gqa=True)
    assert kept(masked) > 4 * B * H * S * S


def test_norms_keep_their_input_and_fp32_per_row():
    def rms(make):
        return F.rms_norm(make(B, S, D, dtype=torch.bfloat16), [D], make(D, dtype=torch.bfloat16))

    def layer(make):
        x, w = make(B, S, D, dtype=torch.bfloat16), make(D, dtype=torch.bfloat16)
        return F.layer_norm(x, [D], w, make(D, dtype=torch.bfloat16))

    assert kept(rms) == B * S * D * 2 + D * 2 + B * S * 4
    assert kept(layer) in (B * S * D * 2 + D * 2 + 2 * B * S * 4, B * S * D * 2 + 2 * D * 2 + 2 * B * S * 4)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # as torch says it
def test_a_norm_without_a_weight_and_one_in_two_dtypes_train():
    assert kept(lambda make: F.rms_norm(make(B, S, D), [D])) == B * S * D * 4 + B * S * 4
    assert kept(lambda make: F.rms_norm(make(B, S, D, dtype=torch.bfloat16), [D], make(D))) > 0


@pytest.mark.parametrize("device", ["planned", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_groups_have_all_shapes_and_operations_whoever_the_rows_go_to(device, dtype):
    groups, rows, inner, outer = 4, 24, 16, 32
    device = CPU if device == "cpu" else use_planned_device()
    with torch.autograd.set_multithreading_enabled(False), FakeTensorMode(), as_on(device):
        a = torch.zeros(rows, inner, dtype=dtype, device=device, requires_grad=True)
        b = torch.zeros(groups, inner, outer, dtype=dtype, device=device, requires_grad=True)
        ends = torch.zeros(groups, dtype=torch.int32, device=device)
        with FlopCounterMode(display=False) as count:
            out = F.grouped_mm(a, b, offs=ends)
            out.sum().backward()
    assert (out.shape, a.grad.shape, b.grad.shape) == ((rows, outer), a.shape, b.shape)
    assert count.get_total_flops() == 3 * 2 * rows * inner * outer


def test_attention_counts_its_operations():
    def run(make):
        with FlopCounterMode(display=False) as count:
            attention(torch.bfloat16)(make).sum().backward()
        run.flops = count.get_total_flops()
        return make(1)

    kept(run)
    forward = 2 * 2 * B * H * S * S * D
    assert run.flops == forward + forward // 2 * 5  # it computes the probabilities again


def test_numbers_from_python_are_on_the_planned_device():
    device = use_planned_device()
    with FakeTensorMode(), as_on(device):
        x = torch.zeros(3, 4, device=device)
        for made in (torch.tensor([1.0, 2.0], device=device), torch.tensor(3).to(device), x[:, [0, -1]]):
            assert made.device == device
        assert torch.tensor(1.0, device=device, requires_grad=True).requires_grad
        assert x[:, [0, -1]].shape == (3, 2)
