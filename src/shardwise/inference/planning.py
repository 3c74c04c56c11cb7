"""From what a person asked for to a plan: which devices, which units, and where the weights of each are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple
from functools import reduce
from typing import Any

import torch
from torch import nn

from shardwise import device as devices
from shardwise.checkpoint.coordination import all_gather_bytes
from shardwise.comm import World
from shardwise.engine.engine import Engine
from shardwise.engine.stored import StoredTensor
from shardwise.engine.stored_build import run_stored
from shardwise.errors import CheckpointError, OffloadError
from shardwise.inference.asked import require_places
from shardwise.inference.budget import activations_and_cache, memory_of
from shardwise.inference.device_map import DeviceMap
from shardwise.inference.hooks import ModelHook
from shardwise.inference.maps import device_of, home_of, places_of, units_of_map, weights_of
from shardwise.inference.micro_batches import use_pieces
from shardwise.inference.plan import DEVICE, Room, Usage, Weights, WeightsPlan, place_weights, whole
from shardwise.inference.rates import Rates, measure
from shardwise.inference.several_devices import PlanOfDevices, place_on_devices, plan_of_places, require_room
from shardwise.inference.turns import take_turns


def choose_plan(
    module: nn.Module,
    tensors: Mapping[str, StoredTensor],
    device_map: str | DeviceMap,
    world: World,
    agreed: Callable[[], AbstractContextManager[object]],
    *,
    max_memory: Mapping[int | str, int | str] | None,
    classes: Sequence[str] | str | None,
    batch: int,
    length: int,
    ahead: int | None,
    verbose: bool,
) -> tuple[WeightsPlan, torch.device]:
    """Where the weights of each unit are, and the main device. For the arguments see :func:`shardwise.load`.

    Collective if all ranks split the model: they make one plan, with the least that one of them has.

    Args:
        agreed: makes a block whose errors are raised on all ranks that split the model.

    Raises:
        UnitError, OffloadError, DeviceError: see there.
    """
    split, named = device_map == "split", isinstance(device_map, str)
    with agreed():
        fixed, cache = activations_and_cache(module, batch=batch, length=length)
        if ahead is not None and ahead < 0:
            raise OffloadError(f"ahead={ahead}", fix="0 or more, or None")
        main = world.device if isinstance(device_map, str) else device_of(device_map)
        mine = [main] if split or not named else devices.of_this_rank(main, world.local_size)
        rooms, host = memory_of(mine, max_memory, world.local_size) if named else ({}, 0)
        units = units_of_map(module, {} if isinstance(device_map, str) else device_map, classes, apart=len(rooms) > 1)
        if not isinstance(device_map, str):
            require_places(module, device_map)
        weights = weights_of(module, units, tensors, world.size)

    def usage(at: torch.device) -> Usage:
        """How fast everything is, on the slowest of the ranks that share the model."""
        with agreed():
            files = {piece.file for t in tensors.values() for piece in (*t.pieces, *(t.other or ())[:1])}
            kind = next((t.dtype for t in tensors.values() if t.dtype.is_floating_point), torch.float32)
            rates = measure(files, at, kind, batch)
        return Usage(batch, length, reduce(Rates.slower, map(Rates.of, _of_all(astuple(rates))) if split else [rates]))

    if not isinstance(device_map, str):
        places = places_of(units, device_map, main)
        homes = {name: home_of(name, device_map, places[name]) for name in units}
        told = usage(places[""]) if verbose and {*homes.values()} != {DEVICE} and len({*places.values()}) == 1 else None
        plan = plan_of_places(weights, homes, places, ahead, fixed, cache, told)
        if max_memory is not None:
            used = list(dict.fromkeys([main, *places.values()]))
            require_room(plan, main, *memory_of(used, max_memory, world.local_size))
        return plan, places[""]
    if len(rooms) > 1:
        found = place_on_devices(weights, rooms, host, ahead=ahead, fixed=fixed, cache=cache, order=device_map)
        return found, found.places[""]
    ((main, there),) = rooms.items()
    room, parts = Room(there, host, fixed + cache), world.size if split else 1
    if split:
        told_by = _of_all([_asked_for(weights, tensors), *astuple(room)])
        if len({asked for asked, *_ in told_by}) > 1:
            raise CheckpointError(
                "ranks that split one model ask for different dtypes or units of it, or have different files",
                where=f"rank {world.rank}",
                fix="give dtype=, no_split_module_classes= and the folder alike on all ranks",
            )
        room = Room(*(min(sizes) for sizes in zip(*(sizes for _, *sizes in told_by), strict=True)))
    fits = whole(weights, room, parts, ahead).device <= room.device
    told = None if fits else usage(main)
    with agreed():
        return place_weights(weights, room, parts=parts, ahead=ahead, usage=told), main


def _asked_for(weights: Sequence[Weights], tensors: Mapping[str, StoredTensor]) -> str:
    """What ranks that split a model must have alike: its units and tensors."""
    told = [(w.name, w.nbytes) for w in weights], [(n, str(t.dtype), t.shape) for n, t in tensors.items()]
    return hashlib.sha256(repr(told).encode()).hexdigest()


def _of_all(values: Sequence[float | str]) -> list[list[Any]]:
    """What every rank has, in rank order. Collective."""
    return [json.loads(data) for data in all_gather_bytes(json.dumps(values).encode())]


def run_planned(
    module: nn.Module,
    tensors: MutableMapping[str, StoredTensor],
    plan: WeightsPlan,
    main: torch.device,
    micro_batches: int | None = None,
    seen: Callable[[int], None] | None = None,
) -> Engine:
    """Let a module run as a plan says: see :func:`~shardwise.engine.stored_build.run_stored`.

    Of several devices ``hf_device_map`` tells other libraries, as Accelerate does.
    """
    places = plan.places if isinstance(plan, PlanOfDevices) else None
    plans: Mapping[torch.device, WeightsPlan] = plan.plans if isinstance(plan, PlanOfDevices) else {main: plan}
    engine = run_stored(
        module, tensors, plan.homes, main, split=plan.parts > 1, ahead=plan.ahead, places=places,
        room={at: its.streaming for at, its in plans.items()}, seen=seen,
    )  # fmt: skip
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
