"""Wrappers around modules: which there are, and what is inside."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = [
    "extract_model_from_parallel",
    "get_module_children_bottom_up",
    "get_module_class_from_name",
    "has_compiled_regions",
    "is_compiled_module",
    "model_has_dtensor",
]


def is_compiled_module(module: Any) -> bool:
    """Is it what ``torch.compile(module)`` returned?"""
    return isinstance(getattr(module, "_modules", {}).get("_orig_mod"), nn.Module)


def has_compiled_regions(module: nn.Module) -> bool:
    """Was a part of it compiled, by ``torch.compile(part)`` or ``part.compile()``?"""
    return any(is_compiled_module(m) or m._compiled_call_impl is not None for m in module.modules())


def _is_wrapper(module: Any) -> bool:
    """One of the wrappers for training on many ranks, of torch, of DeepSpeed, or of ours."""
    if not isinstance(getattr(module, "module", None), nn.Module):
        return False
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return True
    for kind in type(module).__mro__:
        home = kind.__module__
        if (kind.__name__ == "FullyShardedDataParallel" and home.startswith("torch.distributed.")) or (
            kind.__name__ == "DeepSpeedEngine" and home.startswith("deepspeed.")
        ):
            return True
        if home.startswith("shardwise.fsdp."):
            return True
    return False


def extract_model_from_parallel(
    model: nn.Module, keep_fp32_wrapper: bool = True, keep_torch_compile: bool = True, recursive: bool = False
) -> nn.Module:
    """The caller's own module, without the wrappers around it. Prepared models are that already.

    Args:
        keep_fp32_wrapper: leave a forward that :func:`convert_outputs_to_fp32` wrapped as it is.
        keep_torch_compile: leave ``torch.compile``'s wrapper on.
        recursive: take wrappers off the submodules too.
    """
    compiled = model if is_compiled_module(model) else None
    inner: Any = model._orig_mod if compiled is not None else model
    while _is_wrapper(inner):
        inner = inner.module
    if compiled is None and is_compiled_module(inner):  # compiled first, wrapped later
        compiled, inner = inner, inner._orig_mod
        while _is_wrapper(inner):
            inner = inner.module
    if recursive:
        _unwrap_children(inner)
    if not keep_fp32_wrapper:
        original = vars(inner).pop("_original_forward", None)
        if original is not None:
            inner.forward = original
    if compiled is None or not keep_torch_compile:
        return inner
    if compiled._orig_mod is not inner:
        compiled._orig_mod = inner
    return compiled


def _unwrap_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        inner: Any = child
        while _is_wrapper(inner):
            inner = inner.module
        if inner is not child:
            setattr(module, name, inner)
        _unwrap_children(inner)


def get_module_children_bottom_up(model: nn.Module, return_fqns: bool = False) -> list[Any]:
    """All modules, parts before wholes; the last one is ``model``.

    Args:
        return_fqns: return (name, module) pairs.
    """
    found = list(model.named_modules())[::-1]
    return found if return_fqns else [module for _, module in found]


def model_has_dtensor(model: nn.Module) -> bool:
    """Is one of the parameters a DTensor?"""
    from torch.distributed.tensor import DTensor

    return any(isinstance(p, DTensor) for p in model.parameters())


def get_module_class_from_name(module: nn.Module, name: str) -> type[nn.Module] | None:
    """The class of that name among the module and its parts; ``None`` if there is none."""
    return next((type(part) for part in module.modules() if type(part).__name__ == name), None)
