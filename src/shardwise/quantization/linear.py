"""A linear layer with a frozen int8 weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from shardwise.errors import UnitError
from shardwise.quantization.int8 import BLOCK, blocks_of, dequantized, dequantizing_bytes, quantized, require_block


class QuantizedLinear(nn.Linear):
    """``nn.Linear`` whose weight is int8 with one fp32 scale per block of a row. The weight is frozen.

    It computes in the dtype of its input (under autocast, in autocast's): the weight is made in that dtype for the time
    of the product, once more in the backward, and nothing of it is kept. ``.to(dtype)``, ``.half()`` and mixed
    precision leave weight and scales as they are. A state dict with a floating-point weight is quantised when it is
    loaded; one that holds int8 and scales is taken as it is.

    Args:
        in_features, out_features, bias, device: as for ``nn.Linear``, whose initial values it draws.
        dtype: of the bias.
        block: elements that share a scale.

    Attributes:
        weight: ``(out_features, in_features)``, int8.
        scales: ``(out_features, ceil(in_features / block))``, fp32.
        bias: as in ``nn.Linear``; it may be trained.

    Cost: a weight in the compute dtype while it runs, forward and backward.
    """

    scales: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        block: int = BLOCK,
    ) -> None:
        require_block(block)
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.block = in_features, out_features, block
        shapes = (
            ((out_features, in_features), torch.int8),
            ((out_features, blocks_of(in_features, block)), torch.float32),
        )
        self.weight, self.scales = (
            nn.Parameter(torch.empty(shape, dtype=kind, device=device), requires_grad=False) for shape, kind in shapes
        )
        own = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", own)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw what ``nn.Linear`` draws, and quantise it."""
        if self.weight.is_meta:
            return
        options: dict[str, Any] = {"device": self.weight.device, "dtype": torch.float32}
        drawn = nn.Linear(self.in_features, self.out_features, self.bias is not None, **options)
        self.take(drawn.weight)
        if self.bias is not None:
            self.bias.copy_(drawn.bias)

    @torch.no_grad()
    def take(self, weight: torch.Tensor) -> None:
        """Have the values of a floating-point weight.

        Raises:
            UnitError: one is infinite or NaN.
        """
        values, scales = quantized(weight, self.block, type(self).__name__)
        self.weight.copy_(values)
        self.scales.copy_(scales)

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as a matrix of that dtype, new."""
        return dequantized(self.weight.detach(), self.scales.detach(), self.block, dtype)

    def bytes_beside(self, itemsize: int) -> int:
        """What it takes beside its parameters while it runs in a dtype of so many bytes."""
        return dequantizing_bytes(self.weight.numel(), itemsize)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        if self.scales.requires_grad:
            raise UnitError(
                "scales of int8 weights are not trained, and require gradients", fix="scales.requires_grad_(False)"
            )
        bias = None if self.bias is None else self.bias.to(dtype)
        out: torch.Tensor = _Product.apply(input.to(dtype), self.weight, self.scales, bias, self.block)
        return out

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, int8, block={self.block}"

    # --- moving, converting and loading it ----------------------------------------------------------
    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        """The weight and its scales go where they are sent, as integers, which ``.to(dtype)`` does not cast."""
        kept = (self.weight, self.scales)

        def as_integers(t: torch.Tensor) -> torch.Tensor:
            if not any(t is k for k in kept):
                return fn(t)
            kind = torch.int8 if t.dtype == torch.int8 else torch.int32
            moved = fn(t.view(kind))
            if moved.dtype != kind:
                raise UnitError(
                    f"an int8 weight cannot become {moved.dtype}",
                    fix="dequantized() gives the weight that it stands for",
                )
            return moved.view(t.dtype)

        super()._apply(as_integers, recurse)
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        weight = state_dict.get(f"{prefix}weight")
        if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.shape == self.weight.shape:
            values, scales = quantized(weight, self.block, f"{prefix}weight")
            state_dict |= {f"{prefix}weight": values, f"{prefix}scales": scales}
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _Product(torch.autograd.Function):
    """``F.linear`` with a weight that exists only while it is used."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: Any, block: int) -> Any:
        ctx.save_for_backward(weight, scales)
        ctx.block = block
        return F.linear(x, dequantized(weight, scales, block, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, scales = ctx.saved_tensors
        of_x = grad @ dequantized(weight, scales, ctx.block, grad.dtype) if ctx.needs_input_grad[0] else None
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.needs_input_grad[3] else None
        return of_x, None, None, of_bias, None
