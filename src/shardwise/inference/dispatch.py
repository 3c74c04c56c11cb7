"""Accelerate's words for running large models: ``dispatch_model``, ``cpu_offload``, ``disk_offload`` and loading.

All of them are :func:`shardwise.load` with the weights somewhere else: in a checkpoint, or in a model that has them.
What is to come from a disk is written to ``offload_dir`` first, once, where it is in memory; weights of checkpoints are
read where they are. ``forward``, class and mode (``train`` or ``eval``) of the modules stay what they were.
``offload_buffers`` and ``preload_module_classes`` have nothing to decide: buffers are where the model runs, and a
unit's weights are all there while it runs. Inputs may be on any device, and outputs come back to where these were.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shardwise.errors import UnitError
from shardwise.inference.device_map import DeviceMap
from shardwise.inference.dtypes import as_dtype
from shardwise.inference.load import load


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
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> nn.Module:
    """:func:`shardwise.load` of a module without values, in Accelerate's words.

    Args:
        device_map: ``None``: everything stays where the model runs.
        offload_folder, offload_state_dict: nothing is written; weights are read from ``checkpoint`` itself.

    Raises:
        CheckpointError: also with ``strict=False``, where a parameter would be left without values.
    """
    modes = {m: m.training for m in model.modules()}
    loaded: nn.Module = load(
        model,
        device_map,
        checkpoint=checkpoint,
        max_memory=max_memory,
        dtype=dtype,
        no_split_module_classes=no_split_module_classes,
        strict=strict,
    )
    for module, training in modes.items():
        module.training = training
    return loaded


def load_checkpoint_in_model(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: DeviceMap | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    offload_state_dict: bool = False,
    offload_buffers: bool = False,
    keep_in_fp32_modules: Sequence[str] | None = None,
    offload_8bit_bnb: bool = False,
    strict: bool = False,
    full_state_dict: bool = True,
    broadcast_from_rank0: bool = False,
) -> None:
    """Give a model the values of a checkpoint, one tensor at a time. Nothing runs differently afterwards.

    Args:
        device_map: where each value goes; ``"disk"``: to ``offload_folder``, and the parameter stays without values.
            ``None``: where the parameter is, and to the CPU if that is nowhere.
        dtype: of floating-point values; ``None``: that of the model.
        offload_buffers: buffers go to the disk, too; by default they are where they were.
        strict: raise if names differ. Other shapes always do.

    Raises:
        CheckpointError: no weights, or they do not fit.
        OffloadError: something goes to the disk, and there is no folder for it.
    """
    from shardwise.inference.dispatching import load_in

    if keep_in_fp32_modules or offload_8bit_bnb:
        raise UnitError("keep_in_fp32_modules and offload_8bit_bnb are not served", fix="shardwise.load, without them")
    kind = None if dtype is None else as_dtype(dtype)
    load_in(model, checkpoint, device_map, offload_folder, kind, offload_buffers, strict)


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
        device_map: from names of modules to ``"disk"``, ``"cpu"``, or a device.
        main_device: where inputs go, and what runs before the first module with a device; default: the first one that
            the map names.
        state_dict: values for parameters that are on the meta device.
        offload_dir: an existing or new folder for what goes to the disk. Parameters on the meta device that neither
            ``state_dict`` nor ``offload_index`` have are there already, with an index: they are read where they are.
        offload_index: in which files values are, by the names of parameters, as for
            :class:`~shardwise.inference.offloaded.OffloadedWeightsLoader`.
        skip_keys: keys of inputs and outputs whose values stay on their device.
        force_hooks: have the model run by this library also if all of it is in one place.

    Raises:
        OffloadError: something goes to the disk, and there is no folder for it; a file of the index is not right.
        UnitError: the map names unknown modules or leaves some out, or a parameter has no values.

    Cost: one unit's values beside the model's while it is taken over.
    """
    from shardwise.inference.dispatching import dispatch

    return dispatch(model, device_map, state_dict, offload_dir, offload_index, main_device, force_hooks)


def cpu_offload(
    model: nn.Module,
    execution_device: Any = None,
    offload_buffers: bool = False,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    preload_module_classes: Any = None,
) -> nn.Module:
    """Keep a model's weights in host memory, and bring them to the device as they are used, ahead of that use."""
    from shardwise.inference.dispatching import all_of_it

    return all_of_it(model, "cpu", execution_device, state_dict, None)


def disk_offload(
    model: nn.Module,
    offload_dir: str | os.PathLike[str],
    execution_device: Any = None,
    offload_buffers: bool = False,
    preload_module_classes: Any = None,
) -> nn.Module:
    """Write a model's weights to a folder, and read them from there as they are used, ahead of that use."""
    from shardwise.inference.dispatching import all_of_it

    return all_of_it(model, "nvme", execution_device, None, offload_dir)
