"""Models that have their values: where each unit's go, and what of them is written to a folder first."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from shardwise import device as devices
from shardwise.checkpoint.formats import open_source
from shardwise.checkpoint.model_state import model_states
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.engine.build import members_of
from shardwise.engine.stored import StoredTensor
from shardwise.errors import OffloadError, UnitError
from shardwise.inference.device_map import DeviceMap, Place, place_of
from shardwise.inference.loading import fitted, move_buffers, stored_tensor
from shardwise.inference.maps import device_of, home_of, places_of, units_of_map, weights_of
from shardwise.inference.offloaded import offload_weight, save_offload_index
from shardwise.inference.placing import set_module_tensor_to_device
from shardwise.inference.plan import DEVICE, DISK, HOST
from shardwise.inference.planning import run_planned
from shardwise.inference.several_devices import plan_of_places
from shardwise.inference.ties import find_tied_parameters, retie_parameters

Values = Mapping[str, torch.Tensor] | None
Folder = str | os.PathLike[str] | None


def dispatch(
    model: nn.Module, device_map: DeviceMap, values: Values, folder: Folder, main_device: Place | None
) -> nn.Module:
    """See :func:`shardwise.inference.dispatch.dispatch_model`."""
    device = device_of(device_map) if main_device in (None, "cpu", "disk") else devices.named(main_device)
    units = units_of_map(model, device_map, None)
    places = set(device_map.values())
    if len(places) == 1 and "disk" not in places and not _without_values(model):
        return model.to(devices.named(places.pop()))
    where = places_of(units, device_map, device)
    homes = {name: home_of(name, device_map, where[name]) for name in units}
    return _take_over(model, homes, where, values, folder)


def all_of_it(model: nn.Module, home: str, device: Any, values: Values, folder: Folder) -> nn.Module:
    """All weights have one home."""
    where = devices.of_rank() if device is None else devices.named(device)
    units = units_of_map(model, {}, None)
    return _take_over(model, dict.fromkeys(units, home), dict.fromkeys(units, where), values, folder)


@torch.no_grad()
def _take_over(
    model: nn.Module,
    homes: dict[str, str],
    places: dict[str, torch.device],
    values: Values,
    folder: Folder,
) -> nn.Module:
    for name in (name for name in _without_values(model) if values is None or name not in values):
        raise UnitError(
            f"'{name}' is on the meta device and has no values", fix="give state_dict=, or load a checkpoint"
        )
    tensors = {name: _of_memory(p if not p.is_meta else (values or {})[name]) for name, p in _named(model)}
    device = places[""]
    if device.type == "cpu":
        homes = {name: DEVICE if home == HOST else home for name, home in homes.items()}
    weights = weights_of(model, list(homes), tensors)
    if DISK in homes.values():
        _write_out(model, homes, tensors, _made(folder))
    move_buffers(model, device)
    run_planned(model, tensors, plan_of_places(weights, homes, places, 1), device)
    model.eval()
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


def _made(folder: Folder) -> Path:
    """The folder for what goes to the disk."""
    if folder is None:
        raise OffloadError("something goes to the disk, and there is no folder for it", fix="offload_dir='...'")
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the folder cannot be made: {error.strerror}"
        raise OffloadError(what, where=str(path), fix="another one") from error
    return path


def _write_out(model: nn.Module, homes: Mapping[str, str], tensors: dict[str, StoredTensor], folder: Path) -> None:
    """Write what belongs to units of the disk to a file each, and let the tensors be there."""
    reader = StorageReader()
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
            stored = stored_tensor(section[names[0]], None, reader)
            tensors.update(dict.fromkeys(names, stored))


# --- values of a checkpoint into a model ----------------------------------------------------------------
@torch.no_grad()
def load_in(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    device_map: DeviceMap | None,
    folder: Folder,
    dtype: torch.dtype | None,
    strict: bool,
) -> None:
    """See :func:`shardwise.inference.dispatch.load_checkpoint_in_model`."""
    (state,) = model_states([model], placeholders=True)
    found = fitted(state, checkpoint, missing=not strict, surplus=not strict)
    ties = find_tied_parameters(model)
    index: dict[str, dict[str, Any]] = {}
    away: Path | None = None
    with StorageReader() as reader:
        for name, held in {**state.parameters, **state.buffers}.items():
            if name not in found.tensors:
                continue
            stored = found.tensors[name]
            here: Place = "cpu" if held.is_meta else held.device
            at = here if device_map is None else place_of(name, device_map)
            kind = dtype if dtype is not None and stored.dtype.is_floating_point else None
            value = reader.values(stored).view(stored.shape)
            if at != "disk":
                set_module_tensor_to_device(model, name, at, value=value, dtype=kind)
                continue
            away = away or _made(folder)
            offload_weight(value if kind is None else value.to(kind), name, away, index)
    if away is not None:
        save_offload_index(index, away)
    retie_parameters(model, ties)
