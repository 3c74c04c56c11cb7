"""From what a person asked for to a plan: which devices, which units, and where the weights of each are."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import nn

from shardwise import device as devices
from shardwise.comm import World
from shardwise.engine.engine import Engine
from shardwise.engine.stored import StoredTensor
from shardwise.engine.stored_build import run_stored
from shardwise.inference.asked import require_places
from shardwise.inference.budget import activations_and_cache, memory_of
from shardwise.inference.device_map import DeviceMap
from shardwise.inference.hooks import ModelHook
from shardwise.inference.maps import device_of, home_of, places_of, units_of_map, weights_of
from shardwise.inference.micro_batches import use_pieces
from shardwise.inference.plan import Room, WeightsPlan, place_weights
from shardwise.inference.several_devices import PlanOfDevices, place_on_devices, plan_of_places, require_room
from shardwise.inference.turns import take_turns


def choose_plan(
    module: nn.Module,
    tensors: Mapping[str, StoredTensor],
    device_map: str | DeviceMap,
    world: World,
    *,
    max_memory: Mapping[int | str, int | str] | None,
    classes: Sequence[str] | str | None,
    batch: int,
    length: int,
    ahead: int,
) -> tuple[WeightsPlan, torch.device]:
    """Where the weights of each unit are, and the main device. For the arguments see :func:`shardwise.load`.

    Raises:
        UnitError, OffloadError, DeviceError: see there.
    """
    fixed, cache = activations_and_cache(module, batch=batch, length=length)
    if not isinstance(device_map, str):
        main = device_of(device_map)
        units = units_of_map(module, device_map, classes)
        require_places(module, device_map)
        weights = weights_of(module, units, tensors)
        places = places_of(units, device_map, main)
        homes = {name: home_of(name, device_map, places[name]) for name in units}
        plan = plan_of_places(weights, homes, places, ahead, fixed, cache)
        if max_memory is not None:
            used = list(dict.fromkeys([main, *places.values()]))
            require_room(plan, main, *memory_of(used, max_memory, world.local_size))
        return plan, places[""]
    split = device_map == "split"
    mine = [world.device] if split else devices.of_this_rank(world.device, world.local_size)
    rooms, host = memory_of(mine, max_memory, world.local_size)
    weights = weights_of(module, units_of_map(module, {}, classes, apart=len(rooms) > 1), tensors)
    if len(rooms) > 1:
        found = place_on_devices(weights, rooms, host, ahead=ahead, fixed=fixed, cache=cache, order=device_map)
        return found, found.places[""]
    ((main, room),) = rooms.items()
    parts = world.size if split else 1
    return place_weights(weights, Room(room, host, fixed + cache), parts=parts, ahead=ahead), main


def run_planned(
    module: nn.Module,
    tensors: MutableMapping[str, StoredTensor],
    plan: WeightsPlan,
    main: torch.device,
    micro_batches: int | None = None,
) -> Engine:
    """Let a module run as a plan says: see :func:`~shardwise.engine.stored_build.run_stored`.

    Of several devices ``hf_device_map`` tells other libraries, as Accelerate does.
    """
    places = plan.places if isinstance(plan, PlanOfDevices) else None
    engine = run_stored(module, tensors, plan.homes, main, split=plan.parts > 1, ahead=plan.ahead, places=places)
    module.shardwise_plan = plan  # type: ignore[assignment]
    if places is not None and len({*places.values()}) > 1:
        module.hf_device_map = {name: str(at) for name, at in places.items()}  # type: ignore[assignment]
        encoder: Any = getattr(module, "get_encoder", None)
        if encoder is not None and getattr(module.config, "is_encoder_decoder", False):
            # transformers gives the encoder of such a model a hook of Accelerate's, if it has none.
            encoder()._hf_hook = ModelHook()
    take_turns(engine)
    use_pieces(module, micro_batches, plan)
    return engine
