"""How much of each device's memory a model may take."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from shardwise import device, host
from shardwise.errors import PlacementError
from shardwise.inference.sizes import children_of, class_names, compute_module_sizes, convert_file_size_to_int

_log = logging.getLogger(__name__)
_SHARED = "mps"  # memory of an accelerator that is the host's
_HOST = ("cpu", "disk")
_MARGIN = 1.25  # of the largest piece: so much more than its part a device may take when pieces do not come out even
_SHARE = 0.9  # of the only accelerator's free memory: the rest is for what the model computes

MaxMemory = dict[int | str, float]


def get_max_memory(max_memory: Mapping[int | str, int | float | str] | None = None) -> MaxMemory:
    """Bytes of each device, accelerators first.

    Args:
        max_memory: bytes, or words for them (``"10GB"``), by number of an accelerator, ``"cpu"`` or ``"disk"``. By
            default what is free now: on every accelerator that is this rank's, and this rank's part of what is free on
            the host. An accelerator that does not tell, as
            Apple's, shares the memory of the host, which then stands under its name alone.

    Raises:
        PlacementError: a device of another name.
        ConfigError: a size that is none.
    """
    if max_memory is None:
        return _free()
    numbers = sorted(key for key in max_memory if isinstance(key, int))
    for number in numbers:
        if not 0 <= number < device.count():
            _log.warning("device %s is not available: this process has %s accelerators", number, device.count())
    order: list[int | str] = [*numbers, *(key for key in (_SHARED, *_HOST) if key in max_memory)]
    unknown = [key for key in max_memory if key not in order]
    if unknown:
        raise PlacementError(
            f"{unknown[0]!r} is not a device of a model",
            where="max_memory",
            fix=f"numbers of accelerators, '{_SHARED}', 'cpu' or 'disk'",
        )
    return {key: _bytes(max_memory[key]) for key in order}


def _bytes(size: int | float | str) -> float:
    return convert_file_size_to_int(size) if isinstance(size, str) else size


def _free() -> MaxMemory:
    found: MaxMemory = {}
    kind = device.accelerator()
    own, ranks = device.numbers_of_this_rank()
    for index in own:
        try:
            told = device.memory(torch.device(str(kind), index))
        except RuntimeError as error:  # one that is broken, or that another process keeps to itself
            _log.info("device %s cannot be used: %s", index, error)
            continue
        if told is None:
            return {str(kind): _host_memory() // ranks}
        found[index] = told[0]
    found["cpu"] = _host_memory() // ranks
    return found


def is_accelerator(key: int | str) -> bool:
    """Is it one in a table of :func:`get_max_memory`?"""
    return key not in _HOST


def get_balanced_memory(
    model: nn.Module,
    max_memory: Mapping[int | str, int | float | str] | None = None,
    no_split_module_classes: str | Collection[str] | None = None,
    dtype: Any = None,
    special_dtypes: Mapping[str, Any] | None = None,
    low_zero: bool = False,
) -> MaxMemory:
    """Budgets under which :func:`infer_auto_device_map` gives every accelerator about as much as the others.

    The last one keeps all of its memory, so that nothing is left over.

    Args:
        model: looked at alone; it may be on ``meta``.
        max_memory: as for :func:`get_max_memory`. By default what is free; of a single accelerator 90 % of that.
        no_split_module_classes: names of classes that stay in one piece.
        dtype: what floating-point tensors will be stored in.
        special_dtypes: by the name of the tensor.
        low_zero: as little as possible on the first accelerator, for what else is done there.

    Raises:
        PlacementError, ConfigError: as :func:`get_max_memory`.
    """
    budgets = get_max_memory(max_memory)
    ours = [key for key, size in budgets.items() if is_accelerator(key) and size > 0]
    if not ours:
        return budgets
    if len(ours) == 1:
        if max_memory is None and isinstance(ours[0], int):
            budgets[ours[0]] = int(budgets[ours[0]] * _SHARE)
        return budgets
    sizes = compute_module_sizes(model, dtype=dtype, special_dtypes=special_dtypes)
    share = sizes[""] // (len(ours) - low_zero) + _margin(model, sizes, class_names(no_split_module_classes))
    first, *between, last = ours
    for key in between if low_zero else [first, *between]:
        budgets[key] = min(share, budgets[key])
    if low_zero:
        others = sum(budgets[key] for key in [*between, last])
        budgets[first] = min(max(0, sizes[""] - others), budgets[first])
    return budgets


def _margin(model: nn.Module, sizes: Mapping[str, float], whole: set[str]) -> int:
    """By how much pieces may not come out even: the largest that stays whole, or the mean of the smallest modules."""
    pieces = [sizes[name] for name, module in model.named_modules() if name in sizes and type(module).__name__ in whole]
    ends = [
        sizes[name]
        for name, module in model.named_modules()
        if name and name in sizes and not any(f"{name}.{child}" in sizes for child, _ in children_of(module))
    ]
    mean = int(sum(ends) / max(len(ends), 1))
    return int(_MARGIN * max([mean, *pieces]))


def _host_memory() -> int:
    """Bytes that can be taken; 0 if nobody says."""
    found = host.memory()
    return 0 if found is None else found.free
