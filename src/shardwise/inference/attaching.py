"""Adding the hooks that move tensors to all modules of a model that need one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shardwise.inference.align import AlignDevicesHook, Device
from shardwise.inference.hooks import add_hook_to_module
from shardwise.inference.offloaded import PrefixedDataset
from shardwise.inference.placing import TiedParams
from shardwise.inference.sizes import children_of
from shardwise.inference.tensors import named_module_tensors

Keys = str | Sequence[str]
Weights = Mapping[str, torch.Tensor]


def _below(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _is_one_of(module: nn.Module, classes: Collection[str] | None) -> bool:
    return classes is not None and type(module).__name__ in classes


def attach_execution_device_hook(
    module: nn.Module,
    execution_device: Device,
    skip_keys: Keys | None = None,
    preload_module_classes: Collection[str] | None = None,
    tied_params_map: TiedParams | None = None,
) -> None:
    """Bring a module, and every module in it that has no hook yet, to one device, with its inputs at each call.

    Args:
        preload_module_classes: names of classes inside of which no hooks are added.
        skip_keys, tied_params_map: as for :class:`AlignDevicesHook`.
    """
    if not hasattr(module, "_hf_hook") and any(True for _ in named_module_tensors(module, recurse=True)):
        hook = AlignDevicesHook(execution_device, skip_keys=skip_keys, tied_params_map=tied_params_map)
        add_hook_to_module(module, hook)
    if _is_one_of(module, preload_module_classes):
        return
    for _, child in children_of(module):
        attach_execution_device_hook(child, execution_device, skip_keys, preload_module_classes, tied_params_map)


def attach_align_device_hook(
    module: nn.Module,
    execution_device: Device | None = None,
    offload: bool = False,
    weights_map: Weights | None = None,
    offload_buffers: bool = False,
    module_name: str = "",
    skip_keys: Keys | None = None,
    preload_module_classes: Collection[str] | None = None,
    tied_params_map: TiedParams | None = None,
) -> None:
    """Give a hook of its own to every module that has tensors of its own.

    Args:
        weights_map: values by name, as the whole model has it.
        module_name: the module's name in the model.
        preload_module_classes: names of classes whose modules bring the tensors of their submodules too: for those that
            use a submodule's weight without calling the submodule.
        execution_device, offload, offload_buffers, skip_keys, tied_params_map: as for :class:`AlignDevicesHook`.
    """
    seen: set[int] = set()
    left = [(module_name, module)]
    while left:
        name, part = left.pop()
        if id(part) in seen:  # one module with two names has one hook
            continue
        seen.add(id(part))
        at_once = offload and _is_one_of(part, preload_module_classes)
        if at_once or any(True for _ in named_module_tensors(part)):
            hook = AlignDevicesHook(
                execution_device,
                offload=offload,
                weights_map=None if weights_map is None else PrefixedDataset(weights_map, f"{name}." if name else ""),
                offload_buffers=offload_buffers,
                place_submodules=at_once,
                skip_keys=skip_keys,
                tied_params_map=tied_params_map,
            )
            add_hook_to_module(part, hook, append=True)
        if not at_once:
            left += [(_below(name, child_name), child) for child_name, child in reversed(children_of(part))]


def attach_align_device_hook_on_blocks(
    module: nn.Module,
    execution_device: Device | Mapping[str, Any] | None = None,
    offload: bool | Mapping[str, bool] = False,
    weights_map: Weights | None = None,
    offload_buffers: bool = False,
    module_name: str = "",
    skip_keys: Keys | None = None,
    preload_module_classes: Collection[str] | None = None,
    tied_params_map: TiedParams | None = None,
) -> None:
    """Give the blocks of a model the hooks that a device map asks for.

    A block that is not offloaded is brought to its device whole, once. One that is offloaded gets a hook per module
    with tensors. The model itself gets one that brings its output to where the input was.

    Args:
        execution_device: one for all, or by the names of blocks.
        offload: for all, or by the names of blocks.
        module_name, weights_map, preload_module_classes: as for :func:`attach_align_device_hook`.
        offload_buffers, skip_keys, tied_params_map: as for :class:`AlignDevicesHook`.
    """
    for_hooks: dict[str, Any] = {"skip_keys": skip_keys, "tied_params_map": tied_params_map}

    def offloaded(part: nn.Module, name: str, device: Device | None) -> None:
        attach_align_device_hook(
            part,
            device,
            offload=True,
            weights_map=weights_map,
            offload_buffers=offload_buffers,
            module_name=name,
            preload_module_classes=preload_module_classes,
            **for_hooks,
        )

    if not isinstance(execution_device, Mapping) and not isinstance(offload, Mapping):
        if offload:
            offloaded(module, module_name, execution_device)
        else:
            whole = AlignDevicesHook(execution_device, io_same_device=True, place_submodules=True, **for_hooks)
            add_hook_to_module(module, whole)
        return
    where, away = _by_block(execution_device, offload)
    seen: set[int] = set()
    left = [(module_name, module)]
    while left:
        name, part = left.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        left += [(_below(name, child_name), child) for child_name, child in reversed(children_of(part))]
        named = name in where and name in away
        if name and not named:
            continue
        place, stays = where.get(name), named and not away[name]
        if named and not stays:
            offloaded(part, name, place)
        if stays or not named or not hasattr(part, "_hf_hook"):
            hook = AlignDevicesHook(
                place,
                offload_buffers=stays and offload_buffers,
                io_same_device=not name,
                place_submodules=stays,
                **for_hooks,
            )
            add_hook_to_module(part, hook)
        if named and place is not None:
            preload = None if stays else preload_module_classes
            attach_execution_device_hook(part, place, preload_module_classes=preload, **for_hooks)


def _by_block(
    execution_device: Device | Mapping[str, Any] | None, offload: bool | Mapping[str, bool]
) -> tuple[Mapping[str, Any], Mapping[str, bool]]:
    if isinstance(execution_device, Mapping):
        return execution_device, offload if isinstance(offload, Mapping) else dict.fromkeys(execution_device, offload)
    assert isinstance(offload, Mapping)
    return dict.fromkeys(offload, execution_device), offload
