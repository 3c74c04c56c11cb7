"""Quantised weights of other libraries: what is served as it is, what first has to become plain tensors, and what not.

*bitsandbytes*' 4-bit weights are bytes, and served as they are; their scales are attributes, and stay on each rank.
Its 8-bit layers hold their weight a second time, in a place of their own, so that it cannot come and go.
*torchao*'s weights, and whatever else is a tensor made of tensors, are served as these: :func:`as_plain_parameters`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from shardwise.errors import UnitError
from shardwise.quantization.linear import QuantizedLinear

# Names of bitsandbytes: its classes of parameters, and what a 4-bit layer on the CPU asks before it writes other bytes
# into its weight, for good.
_BYTES, _HELD_TWICE, _REPACKS = "Params4bit", "Int8Params", "support_avx512bf16_for_cpu"


def is_made_of_others(tensor: torch.Tensor) -> bool:
    """Is it a tensor of a subclass with ``__tensor_flatten__``?"""
    return is_traceable_wrapper_subclass(tensor)


class Rebuilt(nn.Module):
    """A parametrization: the tensor that plain tensors were taken out of, made of them again. Nothing is copied.

    Args:
        tensor: of a subclass with ``__tensor_flatten__``.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        parts: Any = tensor
        self.names, self.context = parts.__tensor_flatten__()
        self.kind: Any = type(tensor)
        self.sizes, self.steps = tuple(tensor.size()), tuple(tensor.stride())
        # Of a tensor in a tensor, what it is made of.
        inner = [getattr(tensor, name) for name in self.names]
        self.inner = nn.ModuleList(Rebuilt(t) if is_made_of_others(t) else nn.Module() for t in inner)

    def forward(self, *plain: torch.Tensor) -> Any:
        return self._made(list(plain))

    def _made(self, left: list[torch.Tensor]) -> Any:
        """Made of the first of ``left``, which are taken out."""
        parts = [part._made(left) if isinstance(part, Rebuilt) else left.pop(0) for part in self.inner]
        named = dict(zip(self.names, parts, strict=True))
        return self.kind.__tensor_unflatten__(named, self.context, self.sizes, self.steps)

    def right_inverse(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        out: list[torch.Tensor] = []
        for name, part in zip(self.names, self.inner, strict=True):
            value = getattr(tensor, name)
            out += part.right_inverse(value) if isinstance(part, Rebuilt) else [value]
        return out


def as_plain_parameters(model: nn.Module) -> nn.Module:
    """Have the plain tensors that quantised weights are made of as parameters, in place of these.

    For weights that are tensors made of tensors, as torchao makes them: ``layer.weight`` becomes
    ``layer.parametrizations.weight.original0``, ``original1``, ..., which are sharded, gathered and streamed as any
    other parameters, and ``layer.weight`` is what it was, made of these whenever it is read. Bits stay as they are.

    Args:
        model: changed in place, before it is sharded or dispatched. Such weights have to be frozen.

    Returns:
        The model.

    Raises:
        UnitError: such a weight is to be trained.
    """
    for name, module in list(model.named_modules()):
        for attribute, p in list(module._parameters.items()):
            if p is None or not is_made_of_others(p):
                continue
            if p.requires_grad:
                raise UnitError(
                    f"{type(p).__name__} requires gradients, which the tensors that it is made of cannot get",
                    where=f"parameter '{attribute}' of module '{name}'",
                    fix="requires_grad_(False), and train adapters beside it",
                )
            parametrize.register_parametrization(module, attribute, Rebuilt(p), unsafe=True)
            made: Any = module.parametrizations
            for part in made[attribute].parameters():
                part.requires_grad_(False)
    return model


def bring_meaning(p: nn.Parameter, device: torch.device) -> None:
    """Have what says what a parameter's bytes mean where these are used; bitsandbytes keeps it in an attribute."""
    state = vars(p).get("quant_state")
    if state is not None:
        state.to(device)


def keeps_dtype(module: nn.Module, name: str) -> bool:
    """Has a parameter its meaning in its own dtype only: scales, or bytes that are called numbers?"""
    if isinstance(module, QuantizedLinear):
        return name == "scales"
    if isinstance(module, parametrize.ParametrizationList):
        return any(isinstance(part, Rebuilt) for part in module)
    return type(module._parameters[name]).__name__ == _BYTES


def admit(model: nn.Module, params: Iterable[tuple[str, torch.Tensor]], *, comes_and_goes: bool) -> None:
    """Let quantised weights be bytes to whoever moves them, or raise.

    Args:
        model: whose layers are told to leave them as they are.
        params: with their names.
        comes_and_goes: values are released between uses.

    Raises:
        UnitError: a parameter is no plain tensor, or one whose bytes cannot go. Says what to do.
    """
    for name, p in params:
        if is_made_of_others(p):
            raise UnitError(
                f"parameter '{name}' is a {type(p).__name__}, a tensor made of other tensors",
                fix="call shardwise.as_plain_parameters(model) first",
            )
        if comes_and_goes and type(p).__name__ == _HELD_TWICE:
            raise UnitError(
                f"parameter '{name}' is of bitsandbytes' 8-bit kind, whose layers keep all of it themselves",
                fix="shardwise.quantize, bitsandbytes' 4-bit weights, or a strategy that keeps parameters whole",
            )
    for module in model.modules() if comes_and_goes else ():
        if hasattr(module, _REPACKS):
            setattr(module, _REPACKS, False)
