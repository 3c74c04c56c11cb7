"""Mixed precision: what computes in ``param_dtype``, what does not, and how the two meet.

Values of parameters are in ``param_dtype``, but for those that a module uses together with statistics in its buffers:
torch's kernels want both in one dtype, and statistics of many steps are lost in a half one.

What a unit is called with is cast to ``param_dtype``, as FSDP2 does; or, with ``autocast``, left as it is: then the
model runs under ``torch.autocast``, which casts what goes into a matrix product, and no label, timestep or position.
Autocast is made for models of fp32 parameters. Where it leaves a kernel alone that wants input and parameters in one
dtype, the module's input is cast here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrize import ParametrizationList

from shardwise.device import HALF_PRECISION
from shardwise.placement import DTYPE_NAMES
from shardwise.quantization.others import keeps_dtype
from shardwise.strategy import Strategy
from shardwise.trees import map_tensors

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
_ONE_DTYPE = (*_NORMS, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.EmbeddingBag)
"""Modules whose kernels want input and parameters in one dtype, also under autocast (on some devices)."""


def compute_dtype(strategy: Strategy, holders: Iterable[tuple[nn.Module, str]]) -> torch.dtype | None:
    """The dtype that a parameter must compute in; ``None``: as the strategy says.

    Args:
        holders: the modules that have it, each with the attribute's name.
    """
    if strategy.param_dtype is None:
        return None
    found = next((d for module, name in holders if (d := _needed(module, name, bool(strategy.autocast)))), None)
    return None if found is param_dtype(strategy) else found


def param_dtype(strategy: Strategy) -> torch.dtype | None:
    return None if strategy.param_dtype is None else getattr(torch, DTYPE_NAMES[strategy.param_dtype])


def autocast_dtype(strategy: Strategy) -> torch.dtype | None:
    """The dtype of the autocast that a unit runs under, if it does."""
    return param_dtype(strategy) if strategy.autocast else None


def cast_inputs(dtype: torch.dtype, args: Any, kwargs: Any) -> Any:
    """New ``(args, kwargs)`` with floating-point tensors in ``dtype``."""
    return map_tensors((args, kwargs), partial(_in_dtype, dtype))


def match_inputs(modules: Iterable[nn.Module]) -> None:
    """Have those of the modules that need it called with inputs in the dtype of their parameters, from now on."""
    for module in modules:
        if isinstance(module, _ONE_DTYPE) and _match not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_match, with_kwargs=True)


def compute_in(model: nn.Module, strategy: Strategy) -> None:
    """Have a model that is not sharded, and will not be trained, compute as a sharded one would.

    Values of its parameters are rounded; those of buffers are not.
    """
    low = param_dtype(strategy)
    assert low is not None
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_floating_point():
                holders.setdefault(id(p), []).append((module, name))
    for its in holders.values():
        module, name = its[0]
        p = module._parameters[name]
        assert p is not None
        p.data = p.data.to(compute_dtype(strategy, its) or low)
    if strategy.autocast:
        match_inputs(model.modules())
    region = _Region(low, autocast=bool(strategy.autocast))
    model.register_forward_pre_hook(region.enter, with_kwargs=True)
    model.register_forward_hook(region.leave, always_call=True)


class _Region:
    """Hooks around the forward of a model that is not sharded."""

    def __init__(self, dtype: torch.dtype, *, autocast: bool) -> None:
        self.dtype, self.autocast = dtype, autocast
        self._entered: list[torch.autocast] = []

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.autocast:
            return cast_inputs(self.dtype, args, kwargs)
        p = next(module.parameters(), None)
        region = torch.autocast("cpu" if p is None else p.device.type, self.dtype, cache_enabled=False)
        region.__enter__()
        self._entered.append(region)
        return None

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._entered:
            self._entered.pop().__exit__(None, None, None)


def _needed(module: nn.Module, name: str, autocast: bool) -> torch.dtype | None:
    """The dtype that a parameter must keep, for the sake of the module that has it."""
    if keeps_dtype(module, name):
        own = module._parameters[name]
        return None if own is None else own.dtype
    buffers = {key: b for key, b in module._buffers.items() if b is not None and b.is_floating_point()}
    statistics = [b for key, b in buffers.items() if key.startswith("running_")]
    if name.endswith("_orig"):  # torch.nn.utils.spectral_norm: its estimates of singular vectors
        statistics += [b for key, b in buffers.items() if key == name.removesuffix("_orig") + "_u"]
    if isinstance(module, ParametrizationList):  # and parametrizations.spectral_norm
        statistics += [b for b in module.buffers() if b.is_floating_point()]
    if statistics:
        return statistics[0].dtype
    if autocast and isinstance(module, _NORMS) and not _is_torchs_own(module):
        param = module._parameters[name]  # its own forward may compute in fp32, as many do to be precise
        return None if param is None else param.dtype
    return None


def _is_torchs_own(module: nn.Module) -> bool:
    return type(module).forward.__module__.startswith("torch.nn.")


def _match(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A forward pre-hook. What is in a half dtype stays so beside statistics in fp32: such kernels take it."""
    dtype = next((p.dtype for p in module._parameters.values() if p is not None), None)
    if dtype not in HALF_PRECISION:
        return None
    return cast_inputs(dtype, args, kwargs)


def _in_dtype(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != dtype else tensor
