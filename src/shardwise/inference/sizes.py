"""How large the parts of a model are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shardwise.errors import ConfigError
from shardwise.inference.dtypes import dtype_byte_size, is_number_with_fraction, tensor_bytes
from shardwise.inference.tensors import named_module_tensors
from shardwise.sizes import parse_bytes

Part = tuple[str, "nn.Module | torch.Tensor"]
"""A module or a tensor of a model, with its name."""


def convert_file_size_to_int(size: int | str) -> int:
    """Bytes out of ``"5GB"``, ``"1MiB"`` and the like; a small ``b`` at the end (``"8Gb"``) means bits.

    Raises:
        ConfigError: it is no size.
    """
    number = parse_bytes(size) if isinstance(size, (int, str)) else None
    if number is None:
        raise ConfigError(f"size={size!r} is not a size", fix="give bytes, or a number with a unit: '5GB', '512MiB'")
    in_bits = str(size).rstrip().endswith("b") and "i" not in str(size).lower()
    return number // 8 if in_bits else number


class SizeOf:
    """Bytes of a tensor of a model as it will be loaded.

    Args:
        dtype: what floating-point tensors will be stored in, where that is smaller.
        special_dtypes: by the name of the tensor, whatever it is now.

    Raises:
        ConfigError: something that is no dtype.
    """

    def __init__(self, dtype: Any = None, special_dtypes: Mapping[str, Any] | None = None) -> None:
        self._wanted = None if dtype is None else dtype_byte_size(dtype)
        self._special = dict(special_dtypes or {})
        for kind in self._special.values():
            dtype_byte_size(kind)

    def __call__(self, name: str, tensor: torch.Tensor) -> float:
        if name in self._special:
            return tensor_bytes(tensor, self._special[name])
        now = tensor_bytes(tensor)
        if self._wanted is None or not is_number_with_fraction(tensor.dtype):
            return now
        later = tensor.numel() * self._wanted
        return min(now, int(later) if later == int(later) else later)

    def named_specially(self, name: str) -> bool:
        """Is there a dtype for the tensor of this name alone?"""
        return name in self._special


def compute_module_sizes(
    model: nn.Module,
    dtype: Any = None,
    special_dtypes: Mapping[str, Any] | None = None,
    buffers_only: bool = False,
) -> dict[str, float]:
    """Bytes of each submodule and tensor by name; the whole model's under ``""``.

    A tied parameter counts once, under its first name.

    Args:
        dtype: what floating-point tensors will be stored in, where that is smaller.
        special_dtypes: by the name of the tensor.
        buffers_only: count no parameters.

    Returns:
        Names that do not occur have size 0.
    """
    size_of = SizeOf(dtype, special_dtypes)
    sizes: dict[str, float] = defaultdict(int)
    for name, tensor in model.named_buffers() if buffers_only else named_module_tensors(model, recurse=True):
        size = size_of(name, tensor)
        parts = name.split(".")
        for i in range(len(parts) + 1):
            sizes[".".join(parts[:i])] += size
    return sizes


def compute_module_total_buffer_size(
    model: nn.Module, dtype: Any = None, special_dtypes: Mapping[str, Any] | None = None
) -> float:
    """Bytes of all buffers of a model, those that state dicts leave out too; the arguments are those of
    :func:`compute_module_sizes`."""
    return compute_module_sizes(model, dtype, special_dtypes, buffers_only=True).get("", 0)


def children_of(module: nn.Module | torch.Tensor) -> list[tuple[str, nn.Module]]:
    """The submodules, under all their names: ``named_children`` leaves out the second name of a shared one."""
    if not isinstance(module, nn.Module):
        return []
    return [(name, child) for name, child in module._modules.items() if child is not None]


def class_names(no_split_module_classes: str | Collection[str] | None) -> set[str]:
    """Names of classes, as callers give them: one, several, or none."""
    given = no_split_module_classes or ()
    return {given} if isinstance(given, str) else set(given)


def get_max_layer_size(
    modules: Sequence[Part], module_sizes: Mapping[str, float], no_split_module_classes: str | Collection[str] | None
) -> tuple[float, list[str]]:
    """Bytes of the largest layer, and the names of all that are as large.

    A layer is a module without submodules, one of a class that must not be cut, or a tensor outside of these.

    Args:
        modules: what to look through, with names.
        module_sizes: by name, from :func:`compute_module_sizes`.
        no_split_module_classes: names of classes that stay in one piece.
    """
    whole = class_names(no_split_module_classes)
    largest: float = 0
    names: list[str] = []
    left = list(reversed(modules))
    while left:
        name, part = left.pop()
        inside = children_of(part)
        if inside and type(part).__name__ not in whole:
            left.extend((f"{name}.{child}" if name else child, module) for child, module in reversed(inside))
            continue
        size = module_sizes.get(name, 0)
        if size > largest:
            largest, names = size, []
        if size == largest:
            names.append(name)
    return largest, names


def calculate_maximum_sizes(model: nn.Module) -> tuple[float, tuple[float, list[str]]]:
    """Bytes of a model, and its largest layer as :func:`get_max_layer_size` tells it.

    What must not be cut is asked of the model, as those of ``transformers`` know it.
    """
    sizes = compute_module_sizes(model)
    return sizes[""], get_max_layer_size(parts_of(model), sizes, getattr(model, "_no_split_modules", None))


def parts_of(module: nn.Module, prefix: str = "") -> list[Part]:
    """What a module is made of: its own parameters, its submodules, its own buffers."""
    found: list[Part] = [(name, p) for name, p in module._parameters.items() if p is not None]
    found += children_of(module)
    found += [(name, buffer) for name, buffer in module._buffers.items() if buffer is not None]
    return [(f"{prefix}.{name}" if prefix else name, part) for name, part in found]
