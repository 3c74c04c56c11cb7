"""Models that have their values: where each unit's go, and what of them is written to a folder first."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from shardwise import device as devices
from shardwise.checkpoint.formats import open_source
from shardwise.checkpoint.model_state import model_states
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.engine.build import members_of
from shardwise.engine.hooks import engine_of
from shardwise.errors import OffloadError, UnitError
from shardwise.inference.asked import Asked, map_of, require_places
from shardwise.inference.device_map import DeviceMap, Place, place_of
from shardwise.inference.holdings import Folder, Holdings, Index, Values
from shardwise.inference.loading import fitted, move_buffers, stored_tensor
from shardwise.inference.maps import device_of, home_of, places_of, units_of_map, weights_of
from shardwise.inference.offloaded import offload_weight, save_offload_index
from shardwise.inference.placing import set_module_tensor_to_device
from shardwise.inference.plan import DEVICE, DISK, HOST
from shardwise.inference.planning import run_planned
from shardwise.inference.several_devices import plan_of_places
from shardwise.inference.ties import find_tied_parameters, retie_parameters
from shardwise.quantization.others import admit

_log = logging.getLogger(__name__)


def dispatch(
    model: nn.Module,
    asked: Asked,
    values: Values,
    folder: Folder,
    index: Index,
    main_device: Place | None,
    force: bool,
) -> nn.Module:
    """See :func:`shardwise.inference.dispatch.dispatch_model`."""
    device_map = map_of(asked)
    inside = next((m for m in model.modules() if engine_of(m) is not None), None)
    if inside is model:
        raise UnitError(f"{type(model).__name__} is dispatched already", fix="load it again to place it elsewhere")
    if inside is not None:
        _place_the_rest(model, inside)
        model.hf_device_map = dict(device_map)  # type: ignore[assignment]
        return model
    device = device_of(device_map) if main_device in (None, "cpu", "disk") else devices.named(main_device)
    units = units_of_map(model, device_map, None)
    require_places(model, device_map)
    places = set(device_map.values())
    if len(places) == 1 and "disk" not in places and not force and not any(p.is_meta for p in model.parameters()):
        ties = find_tied_parameters(model)
        model.to(devices.named(places.pop()))
        retie_parameters(model, ties)  # on some devices each module gets a new parameter
    else:
        where = places_of(units, device_map, device)
        homes = {name: home_of(name, device_map, where[name]) for name in units}
        _take_over(model, homes, where, values, folder, index)
    model.hf_device_map = dict(device_map)  # type: ignore[assignment]
    return model


@torch.no_grad()
def _place_the_rest(model: nn.Module, inside: nn.Module) -> None:
    """Of a model that runs from files already, with more around it: adapters, as a rule."""
    engine = engine_of(inside)
    assert engine is not None
    device = next(b.device for unit in engine.units for b in unit.buckets)
    held = {id(slot.param) for unit in engine.units for slot in unit.slots}
    for name, p in _named(model):
        if id(p) not in held and p.device != device:
            set_module_tensor_to_device(model, name, device)
    _log.warning("the weights of %s stay where they were dispatched to before", type(inside).__name__)


def all_of_it(model: nn.Module, home: str, device: Any, values: Values, folder: Folder) -> nn.Module:
    """All weights have one home."""
    where = devices.of_rank() if device is None else devices.named(device)
    units = units_of_map(model, {}, None)
    return _take_over(model, dict.fromkeys(units, home), dict.fromkeys(units, where), values, folder, None)


@torch.no_grad()
def _take_over(
    model: nn.Module,
    homes: dict[str, str],
    places: dict[str, torch.device],
    values: Values,
    folder: Folder,
    index: Index,
) -> nn.Module:
    admit(model, model.named_parameters(), comes_and_goes=True)
    held = Holdings(model, values, folder, index)
    device = places[""]
    if device.type == "cpu":
        homes = {name: DEVICE if home == HOST else home for name, home in homes.items()}
    weights = weights_of(model, list(homes), held.tensors)
    _write_out(model, homes, held, folder)
    move_buffers(model, device)
    run_planned(model, held.tensors, plan_of_places(weights, homes, places), device)
    return model


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def _made(folder: Folder) -> Path:
    """The folder for what goes to the disk."""
    if folder is None:
        raise OffloadError("something goes to the disk, and there is no folder for it", fix="offload_dir='...'")
    path = Path(os.fspath(folder))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = f"the folder cannot be made: {error.strerror}"
        raise OffloadError(what, where=str(path), fix="another one") from error
    return path


def _write_out(model: nn.Module, homes: Mapping[str, str], held: Holdings, folder: Folder) -> None:
    """Write what belongs to units of the disk, and is in memory, to a file for each; let the tensors be there."""
    reader, made = StorageReader(), None
    for k, (unit, members) in enumerate(members_of(_named(model), list(homes)).items()):
        here = [names for _, names in members if names[0] not in held.in_files]
        if homes[unit] != DISK or not here:
            continue
        made = made or _made(folder)
        file = made / f"{k:05d}_{(unit or 'root').replace('.', '_')}.safetensors"
        out = {}
        for names in here:
            tensor = held.tensors[names[0]]
            whole = torch.empty(tensor.shape, dtype=tensor.dtype)
            tensor.convert(0, whole.numel(), whole.view(-1))
            out[names[0]] = whole
        try:
            save_file(out, file.with_name(f"{file.name}.new"))
            file.with_name(f"{file.name}.new").replace(file)  # another model may be running from the one that was there
        except (OSError, SafetensorError) as error:
            raise OffloadError(
                f"the weights of '{unit}' cannot be written: {error}", where=str(file), fix="free space"
            ) from error
        (section,) = open_source(file).sections.values()
        for names in here:
            stored = stored_tensor(section[names[0]], None, reader)
            held.tensors.update(dict.fromkeys(names, stored))


# --- values of a checkpoint into a model ----------------------------------------------------------------
@torch.no_grad()
def load_in(
    model: nn.Module,
    checkpoint: str | os.PathLike[str],
    asked: DeviceMap | None,
    folder: Folder,
    dtype: torch.dtype | None,
    buffers_too: bool,
    strict: bool,
) -> None:
    """See :func:`shardwise.inference.dispatch.load_checkpoint_in_model`."""
    device_map = None if asked is None else map_of(asked)
    (state,) = model_states([model], placeholders=True)
    found = fitted(state, open_source(checkpoint), missing=not strict, surplus=not strict)
    if found.unexpected:
        _log.warning("%s: %s are not the model's, and were not used when it was loaded", checkpoint, found.unexpected)
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
            if at == "disk" and name in state.buffers and not buffers_too:
                at = "cpu" if held.is_meta else held.device  # between calls, too: they are small, and change
            if at != "disk":
                set_module_tensor_to_device(model, name, at, value=value, dtype=kind)
                continue
            away = away or _made(folder)
            offload_weight(value if kind is None else value.to(kind), name, away, index)
            set_module_tensor_to_device(model, name, "meta", dtype=kind)  # whatever it had are not its values
    if away is not None:
        save_offload_index(index, away)
    retie_parameters(model, ties)
