"""Sizes, tied parameters and checkpointed activations of modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from shardwise.compat.imports import is_peft_available
from shardwise.compat.wrappers import extract_model_from_parallel
from shardwise.engine.activations import recompute
from shardwise.engine.select import UnitRule, select_units
from shardwise.errors import ConfigError
from shardwise.sizes import parse_bytes


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


def dtype_byte_size(dtype: torch.dtype) -> float:
    """Bytes that one element needs when it is stored tightly; an eighth for ``torch.bool``, as in Accelerate.

    Raises:
        ConfigError: it is no dtype.
    """
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"{dtype!r} is not a dtype", fix="for example torch.float32")
    return 1 / 8 if dtype == torch.bool else dtype.itemsize


def named_module_tensors(
    module: nn.Module, include_buffers: bool = True, recurse: bool = False, remove_non_persistent: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the parameters and buffers.

    Args:
        include_buffers: buffers too.
        recurse: those of the submodules too.
        remove_non_persistent: not the buffers that are left out of state dicts.
    """
    yield from module.named_parameters(recurse=recurse)
    if not include_buffers:
        return
    passing = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in (module.named_modules() if recurse else [("", module)])
        for name in part._non_persistent_buffers_set
    }
    for name, buffer in module.named_buffers(recurse=recurse):
        if not (remove_non_persistent and name in passing):
            yield name, buffer


def compute_module_sizes(
    model: nn.Module,
    dtype: torch.dtype | str | None = None,
    special_dtypes: dict[str, torch.dtype | str] | None = None,
    buffers_only: bool = False,
) -> dict[str, float]:
    """Bytes of each submodule and tensor by name; the whole model's under ``""``.

    Args:
        dtype: what floating-point tensors will be stored in, where that is smaller.
        special_dtypes: by the name of the tensor.
        buffers_only: count no parameters.
    """
    wanted = None if dtype is None else dtype_byte_size(_dtype(dtype))
    special = {name: dtype_byte_size(_dtype(kind)) for name, kind in (special_dtypes or {}).items()}
    sizes: dict[str, float] = defaultdict(int)
    for name, tensor in model.named_buffers() if buffers_only else named_module_tensors(model, recurse=True):
        each = dtype_byte_size(tensor.dtype)
        if name in special:
            each = special[name]
        elif wanted is not None and (tensor.is_floating_point() or tensor.is_complex()):
            each = min(wanted, each)
        parts = name.split(".")
        for i in range(len(parts) + 1):
            sizes[".".join(parts[:i])] += tensor.numel() * each
    return sizes


def _dtype(value: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, value.removeprefix("torch."), None) if isinstance(value, str) else value
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"{value!r} is not a dtype", fix="for example torch.float32 or 'float32'")
    return found


def find_tied_parameters(model: nn.Module, **kwargs: Any) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, p in model.named_parameters(remove_duplicate=False):
        names[id(p)].append(name)
    return [sorted(group) for group in names.values() if len(group) > 1]


def retie_parameters(model: nn.Module, tied_params: Sequence[Sequence[str]]) -> None:
    """Make the parameters of each group one again: the first that is not on ``meta``."""
    for group in tied_params:
        found = [model.get_parameter(name) for name in group]
        first = next((p for p in found if p.device.type != "meta"), None)
        if first is not None:
            for name in group:
                path, _, last = name.rpartition(".")
                setattr(model.get_submodule(path), last, first)


def id_tensor_storage(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    """What tensors on one storage have in common: device, address and bytes."""
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()


def is_peft_model(model: nn.Module) -> bool:
    """Is it PEFT's, under its wrappers?"""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(extract_model_from_parallel(model, keep_torch_compile=False), PeftModel)


def checkpoint_activations(model: nn.Module, units: UnitRule = None) -> list[str]:
    """Keep only the inputs of some modules for backward, and compute inside them again there.

    What ``activation_checkpointing`` in a strategy does, for modules of one's choice. Call it before the model is
    prepared.

    Args:
        units: which modules, as in :func:`shardwise.fully_shard`.

    Returns:
        Their names.
    """
    return [name for name, module in select_units(model, units) if recompute(module)]
