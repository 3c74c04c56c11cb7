"""Accelerate's words for running large models: ``dispatch_model``, ``cpu_offload``, ``disk_offload`` and loading.

All of them are :func:`shardwise.load` with the weights somewhere else: in a checkpoint, or in a model that has them.
What is to come from a disk is written to ``offload_dir`` first, once, where it is in memory; weights of checkpoints are
read where they are. ``forward`` and class of the modules stay what they were, so ``force_hooks``, ``offload_buffers``,
``skip_keys`` and ``preload_module_classes`` have nothing to decide: buffers are where the model runs, arguments stay as
they are, and a unit's weights are all there while it runs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardwise import device as devices
from shardwise.engine.build import members_of
from shardwise.engine.stored import StoredTensor
from shardwise.engine.stored_build import run_stored
from shardwise.errors import OffloadError, UnitError
from shardwise.inference.load import load
from shardwise.inference.loading import stored_tensor
from shardwise.inference.maps import DeviceMap, device_of, home_of, units_of_map, weights_of
from shardwise.inference.plan import DEVICE, DISK, HOST, WeightsPlan


def load_checkpoint_and_dispatch(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: str | DeviceMap | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: Sequence[str] | str | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_buffers: bool = False,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool | None = None,
    skip_keys: str | Sequence[str] | None = None,
    preload_module_classes: Sequence[str] | None = None,
    force_hooks: bool = False,
    strict: bool = True,
    **_: Any,
) -> nn.Module:
    """:func:`shardwise.load` of a module without values, in Accelerate's words.

    Args:
        device_map: ``None``: everything stays where the model runs.
        offload_folder, offload_state_dict: nothing is written; weights are read from ``checkpoint`` itself.

    Raises:
        CheckpointError: also with ``strict=False``, where a parameter would be left without values.
    """
    classes = [no_split_module_classes] if isinstance(no_split_module_classes, str) else no_split_module_classes
    where: str | DeviceMap = {"": devices.of_rank()} if device_map is None else device_map
    loaded: nn.Module = load(
        model, where, checkpoint=checkpoint, max_memory=max_memory, dtype=dtype, no_split_module_classes=classes
    )
    return loaded


def dispatch_model(
    model: nn.Module,
    device_map: DeviceMap,
    main_device: Any = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    offload_dir: str | os.PathLike[str] | None = None,
    offload_index: Mapping[str, Any] | None = None,
    offload_buffers: bool = False,
    skip_keys: Any = None,
    preload_module_classes: Any = None,
    force_hooks: bool = False,
) -> nn.Module:
    """Let a model whose values are in memory run with each part where the map says.

    Args:
        device_map: from names of modules to ``"disk"``, ``"cpu"``, or the device.
        state_dict: values for parameters that are on the meta device.
        offload_dir: an existing or new folder for what goes to the disk.

    Raises:
        OffloadError: something goes to the disk, and there is no folder for it.
        UnitError: the map names unknown modules or leaves some out, or a parameter has no values.

    Cost: one unit's values beside the model's while it is taken over.
    """
    device = device_of(device_map)
    places = set(device_map.values())
    if len(places) == 1 and "disk" not in places and not _without_values(model) and device_map.keys() == {""}:
        only = next(iter(places))
        return model.to("cpu" if only == "cpu" else devices.named(only))
    units = units_of_map(model, device_map, None)
    return _take_over(
        model, {name: home_of(name, device_map, device) for name in units}, device, state_dict, offload_dir
    )


def cpu_offload(
    model: nn.Module,
    execution_device: Any = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    preload_module_classes: Any = None,
) -> nn.Module:
    """Keep a model's weights in host memory, and bring them to the device as they are used, ahead of that use."""
    device = devices.of_rank() if execution_device is None else devices.named(execution_device)
    return _take_over(model, dict.fromkeys(units_of_map(model, {}, None), HOST), device, state_dict, None)


def disk_offload(
    model: nn.Module,
    offload_dir: str | os.PathLike[str],
    execution_device: Any = None,
    offload_buffers: bool = False,
    preload_module_classes: Any = None,
) -> nn.Module:
    """Write a model's weights to a folder, and read them from there as they are used, ahead of that use."""
    device = devices.of_rank() if execution_device is None else devices.named(execution_device)
    return _take_over(model, dict.fromkeys(units_of_map(model, {}, None), DISK), device, None, offload_dir)


@torch.no_grad()
def _take_over(
    model: nn.Module,
    homes: dict[str, str],
    device: torch.device,
    values: Mapping[str, torch.Tensor] | None,
    folder: str | os.PathLike[str] | None,
) -> nn.Module:
    for name in (name for name in _without_values(model) if values is None or name not in values):
        raise UnitError(
            f"'{name}' is on the meta device and has no values", fix="give state_dict=, or load a checkpoint"
        )
    tensors = {name: _of_memory(p if not p.is_meta else (values or {})[name]) for name, p in _named(model)}
    if device.type == "cpu":
        homes = {name: DEVICE if home == HOST else home for name, home in homes.items()}
    weights = weights_of(model, list(homes), tensors)
    if DISK in homes.values():
        if folder is None:
            raise OffloadError("something goes to the disk, and there is no folder for it", fix="offload_dir='...'")
        _write_out(model, homes, tensors, Path(folder))
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    run_stored(model, tensors, homes, device)
    model.eval()
    model.shardwise_plan = WeightsPlan(homes, {w.name: w.nbytes for w in weights}, 1)  # type: ignore[assignment]
    return model


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def _without_values(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.is_meta]


def _of_memory(values: torch.Tensor) -> StoredTensor:
    """Values that are in memory, until they are taken over."""
    values = values.detach()
    return StoredTensor(values.dtype, tuple(values.shape), (), partial(_copy, values))


def _copy(values: torch.Tensor, start: int, stop: int, out: torch.Tensor) -> None:
    out.copy_(values.reshape(-1)[start:stop])


def _write_out(model: nn.Module, homes: Mapping[str, str], tensors: dict[str, StoredTensor], folder: Path) -> None:
    """Write what belongs to units of the disk to a file each, and let the tensors be there."""
    from safetensors.torch import save_file

    from shardwise.checkpoint.formats import open_source

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OffloadError(
            f"the folder cannot be made: {error.strerror}", where=str(folder), fix="another one"
        ) from error
    for k, (unit, members) in enumerate(members_of(_named(model), list(homes)).items()):
        if homes[unit] != DISK or not members:
            continue
        file = folder / f"{k:05d}_{(unit or 'root').replace('.', '_')}.safetensors"
        out = {}
        for _, names in members:
            tensor = tensors[names[0]]
            whole = torch.empty(tensor.shape, dtype=tensor.dtype)
            tensor.convert(0, whole.numel(), whole.view(-1))
            out[names[0]] = whole
        try:
            save_file(out, file)
        except OSError as error:
            raise OffloadError(
                f"the weights of '{unit}' cannot be written: {error}", where=str(file), fix="free space"
            ) from error
        (section,) = open_source(file).sections.values()
        for _, names in members:
            stored = stored_tensor(section[names[0]], None)
            tensors.update(dict.fromkeys(names, stored))
