"""Operations as the device that is planned for would run them, where its kernels keep other tensors than a CPU's.

Read in torch 2.13: which kernel attention takes (``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``) and what is
done to its arguments before (``aten/src/ATen/native/transformers/attention.cpp``); what each keeps for the backward
(``tools/autograd/derivatives.yaml``); norms (``aten/src/ATen/native/layer_norm.cpp``). Shapes are those of torch's own
rules for tensors without values (``torch/_meta_registrations.py``), and so is all that is not named here:
``layer_norm`` keeps its input, and mean and deviation in fp32; ``cross_entropy`` the logarithms of its probabilities;
``dropout`` a byte for each element. Kernels that scripts bring along, as flash-attn does, are not known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import register_flop_formula

from shardwise.device import HALF_PRECISION
from shardwise.plan.planned_autocast import arguments, autocast_as_on, use_autocast
from shardwise.plan.planned_device import NAME, PLANNED_TENSORS, Instead, planning

_GROUPED: Any = getattr(torch, "_grouped_mm", None)  # what F.grouped_mm calls
_FLASH_HEAD = 256
"""Numbers per head, at most, of the kernel for half precision."""


@contextmanager
def as_on(device: torch.device) -> Iterator[None]:
    """A block in which tensors without values are computed as ``device`` would.

    Args:
        device: planned, which stands for CUDA's kernels; or the CPU, which runs its own.
    """
    if device.type != NAME:
        with _Computing(_EVERYWHERE):
            yield
        return
    use_autocast(NAME)
    with planning(), _Computing(_EVERYWHERE | PLANNED_TENSORS | _FUSED), autocast_as_on(device):
        yield


class _Computing(TorchFunctionMode):
    """Other functions in place of some of torch's. One mode for all of them: each one costs every call of torch."""

    def __init__(self, instead: Mapping[Any, Instead]) -> None:
        self.instead = instead
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        other = self.instead.get(func)
        if other is not None:
            return other(func, args, kwargs or {})
        return func(*args, **kwargs) if kwargs else func(*args)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention if it can, else the kernel that takes masks and fp32, else products and a softmax."""
    tensors = (query, key, value)
    aten = torch.ops.aten
    dense = query.ndim == 4 and query.device.type == NAME and len({t.dtype for t in tensors}) == 1
    width = query.shape[-1]
    if (
        dense
        and attn_mask is None
        and query.dtype in HALF_PRECISION
        and width <= _FLASH_HEAD
        and value.shape[-1] == width
    ):
        scale = width**-0.5 if scale is None else scale
        padded = [F.pad(t, (0, -width % 8)) if width % 8 else t for t in tensors]
        out: Tensor = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, scale=scale)[0]
        return out[..., :width] if width % 8 else out
    aligned = 16 // query.element_size()
    grouped = key.shape[1] != query.shape[1]
    if dense and not grouped and not width % aligned and not value.shape[-1] % aligned:
        mask = _bias(attn_mask, query, key)
        keeps = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(*tensors, mask, keeps, dropout_p, is_causal, scale=scale)[0]
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _bias(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask as the kernel reads it: added to the products, rows aligned to 16 numbers, one for each head by a view."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), float("-inf"))
    columns = mask.shape[-1]
    if columns % 16:
        mask = F.pad(mask, (0, 16 - columns % 16))[..., :columns]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    shape = [normalized_shape] if isinstance(normalized_shape, int) else list(normalized_shape)
    if input.device.type != NAME or (weight is not None and weight.dtype != input.dtype):
        return torch.rms_norm(input, shape, weight, eps)
    out: Tensor = torch.ops.shardwise.fused_rms_norm(input, len(shape), weight)[0]
    return out


def _no_values(name: str) -> NotImplementedError:
    return NotImplementedError(f"shardwise::{name} is for tensors without values")


@torch.library.custom_op("shardwise::fused_rms_norm", mutates_args=())
def _fused_rms_norm(input: Tensor, dims: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    raise _no_values("fused_rms_norm")


@_fused_rms_norm.register_fake
def _(input: Tensor, dims: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = [*input.shape[: input.ndim - dims], *[1] * dims]
    return torch.empty_like(input), input.new_empty(rows, dtype=torch.float32)


@torch.library.custom_op("shardwise::fused_rms_norm_backward", mutates_args=())
def _fused_rms_norm_backward(grad: Tensor, input: Tensor, rstd: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    raise _no_values("fused_rms_norm_backward")


@_fused_rms_norm_backward.register_fake
def _(grad: Tensor, input: Tensor, rstd: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), torch.empty_like(weight) if weight is not None else input.new_empty(0)


def _keep_norm(ctx: Any, inputs: Any, output: Any) -> None:
    input, _, weight = inputs
    ctx.save_for_backward(input, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _norm_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, Tensor | None]:
    input, weight, rstd = ctx.saved_tensors
    to_input, to_weight = torch.ops.shardwise.fused_rms_norm_backward(grad, input, rstd, weight)
    return to_input, None, None if weight is None else to_weight


_fused_rms_norm.register_autograd(_norm_backward, setup_context=_keep_norm)


def _grouped(
    mat_a: Tensor, mat_b: Tensor, offs: Tensor, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    out: Tensor = torch.ops.shardwise.grouped_mm(mat_a, mat_b, offs)
    out = out if out_dtype is None else out.to(out_dtype)
    return out if bias is None else out + bias


@torch.library.custom_op("shardwise::grouped_mm", mutates_args=())
def _grouped_mm(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    raise _no_values("grouped_mm")


@_grouped_mm.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if b.ndim == 3:  # rows of each group with a matrix of its own
        return a.new_empty(a.shape[-2], b.shape[-1])
    return a.new_empty(ends.shape[0], a.shape[-2], b.shape[-1])  # a product for each group of columns


def _keep_grouped(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _grouped_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    a, b, ends = ctx.saved_tensors
    op = torch.ops.shardwise.grouped_mm
    to_a = op(grad, b.transpose(-2, -1), ends) if ctx.needs_input_grad[0] else None
    to_b = op(a.transpose(-2, -1), grad, ends) if ctx.needs_input_grad[1] else None
    return to_a, to_b, None


_grouped_mm.register_autograd(_grouped_backward, setup_context=_keep_grouped)


def _flops_of_groups(a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Whoever the rows go to, each is multiplied once."""
    return int(2 * a[-2] * a[-1] * b[-1])


register_flop_formula(torch.ops.shardwise.grouped_mm)(_flops_of_groups)


def _fused(name: str, kernel: Callable[..., Tensor]) -> Instead:
    def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        args, kwargs = arguments(name, NAME, args, kwargs)  # before torch gets to see it, and autocast
        return kernel(*args, **kwargs)

    return run


# Products of groups of rows: torch has kernels for them in every dtype, and rules for shapes in bf16 only.
_EVERYWHERE: dict[Any, Instead] = {_GROUPED: lambda func, args, kwargs: _grouped(*args, **kwargs)} if _GROUPED else {}
_FUSED = {
    F.scaled_dot_product_attention: _fused("scaled_dot_product_attention", _attention),
    torch.rms_norm: _fused("rms_norm", _rms_norm),
    F.rms_norm: _fused("rms_norm", _rms_norm),
}
