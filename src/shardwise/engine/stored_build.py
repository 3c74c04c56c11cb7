"""From a module without values and files of weights to an engine that runs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, MutableMapping
from functools import partial

import torch
from torch import nn

from shardwise import device as devices
from shardwise.comm import init
from shardwise.engine import crossings
from shardwise.engine.bucket import Bucket
from shardwise.engine.build import holder_of, install, members_of, mesh_of
from shardwise.engine.engine import Engine
from shardwise.engine.hooks import engine_of
from shardwise.engine.joined import LOOK_AHEAD
from shardwise.engine.select import has_forward
from shardwise.engine.stations import keep_together
from shardwise.engine.stored import Reading, StoredBucket, StoredTensor
from shardwise.engine.unit import Unit
from shardwise.errors import UnitError
from shardwise.quantization.others import admit
from shardwise.strategy import Strategy
from shardwise.tiers.home import Home
from shardwise.tiers.page_buffer import PagePool
from shardwise.tiers.stored_files import StoredFiles

WINDOW = 256 << 20
"""Bytes of weights under way at a time while a model is loaded: a fast disk is busy while the next unit is made."""


def run_stored(
    module: nn.Module,
    tensors: MutableMapping[str, StoredTensor],
    homes: Mapping[str, str],
    device: torch.device,
    *,
    split: bool = False,
    ahead: int = 1,
    places: Mapping[str, torch.device] | None = None,
    room: Mapping[torch.device, int] | None = None,
    seen: Callable[[int], None] | None = None,
) -> Engine:
    """Let a module run with weights from files. Collective if ``split``.

    What stays in memory is read now: :data:`WINDOW` bytes are under way at a time, of however many units.

    Args:
        module: its parameters are placeholders, on any device (``meta`` as a rule), which are replaced by others on
            ``device``. Buffers stay as they are.
        tensors: where the values of each parameter are, by each of its names. They are taken out as they are used: what
            is in memory is not kept there twice.
        homes: the units, by name (``""`` is the root, which has to be there), and where each one's weights are between
            two uses: ``device``, ``cpu`` or ``nvme`` (in their files).
        device: where the model runs.
        split: every rank holds, or reads, an equal part of each unit, and has the whole of it while it runs.
        ahead: units that are read ahead of the next one, to a device with memory of its own: each is in a host buffer.
        places: units that run on other devices than ``device``, which is the root's. Buffers go with them.
        room: bytes of each device for units that come and go; ``None``: those that ``ahead`` asks for. On the CPU as
            many are read ahead as it holds.
        seen: told how many bytes of what stays in memory have come, as they do.

    Raises:
        UnitError: the module is sharded already.
        OffloadError: a file cannot be read. Nothing is read any more then, and the module has its own parameters.
    """
    if engine_of(module) is not None:
        raise UnitError(f"{type(module).__name__} is sharded already", fix="load a new one")
    admit(module, module.named_parameters(), comes_and_goes=True)
    world = init(device)
    away = next((home for home in ("nvme", "cpu") if home in homes.values()), "device")
    strategy = _strategy(split, away, ahead)
    engine = Engine(module, strategy, mesh_of(world, device, strategy))
    replaced = _give_placeholders(module, tensors, device)
    params = list(module.named_parameters(remove_duplicate=False))
    for alias in {name for name, _ in params} - {name for name, _ in module.named_parameters()}:
        tensors.pop(alias, None)
    of_unit = members_of(params, list(homes))
    where = {name: (places or {}).get(name, device) for name in homes} | {"": device}
    keep_together(of_unit, where)
    reader, pages = StoredFiles(rank=world.rank), PagePool()
    readings: dict[torch.device, Reading] = {}
    for at in where.values():
        if at not in readings:
            home = Home("cpu", engine.ledger, rank=world.rank, pin=devices.can_pin(at), device=at, ahead=ahead + 1)
            home.reader = reader
            readings[at] = Reading(at, home, reader, pages)
    holder = partial(holder_of, module)
    made: list[Unit] = []
    coming: deque[StoredBucket] = deque()

    def arrive(allowed: int) -> None:
        """Wait for the oldest until no more than so many bytes are under way, or one unit."""
        while coming and (not allowed or len(coming) > 1) and sum(b.held_bytes for b in coming) > allowed:
            came = coming.popleft().arrive()
            if seen is not None:
                seen(came)

    filled = [name for name, its in of_unit.items() if its]
    modules, tags = dict(module.named_modules()), engine.mesh.tags
    comes = split or homes[""] != "device"  # what the root holds comes and goes
    of_root = {name.rpartition(".")[0] for _, names in of_unit.get("", ()) for name in names} if comes else set()
    for name in [*(n for n in modules if n), ""]:
        holds = bool(name) and (name in of_root or _holds_others(modules[name], name, filled))
        if name and name not in filled and not holds:
            continue
        own, reading = _strategy(split, homes.get(name, "device"), ahead), readings[where.get(name, device)]

        def make(
            label: str, members: list[nn.Parameter], names: list[str], own: Strategy = own, reading: Reading = reading
        ) -> Bucket:
            stored = [tensors.pop(n) for n in names]
            bucket = StoredBucket(label, members, names, stored, engine.mesh, own, engine.ledger, reading)
            if bucket.arriving:
                coming.append(bucket)
            return bucket

        members = [(p, names, None) for p, names in of_unit.get(name, ())]
        try:
            unit = Unit(
                name, modules[name], members, holder, engine.mesh, own, engine.ledger, reading.home, engine, make
            )
            arrive(WINDOW if name else 0)  # the root is the last one
        except BaseException:  # an interrupt too
            reader.close()
            engine.mesh.skip_tags(tags + len(filled) - engine.mesh.tags)  # the other ranks have them
            for holds_it, attribute, held in replaced:
                holds_it._parameters[attribute] = held
            raise
        # It has hooks even if it has nothing to do: a script may call an encoder, or a layer of the root, by itself,
        # and what the root holds is needed in it.
        unit.settled = unit.settled and not holds
        made.append(unit)
    engine.take_over(made)
    engine.forward.repeats, engine.forward.room = engine.runs, room
    if room is not None and (all(at.type == "cpu" for at in readings) or "nvme" not in homes.values()):
        engine.forward.ahead = LOOK_AHEAD
    engine.on_copy.append(_repeats_too)
    if any(at.type != "cpu" for at in readings):
        crossings.install(module, of_unit, where)
    install(engine, made)
    engine.runs_alone = not split
    return engine


def _repeats_too(old: Engine, new: Engine, memo: object) -> None:
    new.forward.repeats, new.forward.room, new.forward.ahead = new.runs, old.forward.room, old.forward.ahead


def _holds_others(module: nn.Module, name: str, units: Collection[str]) -> bool:
    """May a module be called by itself, with units inside it?"""
    return has_forward(module) and any(unit.startswith(f"{name}.") for unit in units)


def _strategy(split: bool, home: str, ahead: int) -> Strategy:
    return Strategy.parse("zero3" if split else "ddp").replace(
        offload_params=home, offload_prefetch=ahead, broadcast_buffers=False
    )


def _give_placeholders(
    module: nn.Module, tensors: Mapping[str, StoredTensor], device: torch.device
) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Replace parameters by frozen ones of the right dtype on the device, which have no memory. Ties stay.

    Returns:
        Which module had which one under which name.
    """
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    made: dict[int, nn.Parameter] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if id(p) not in made:
            made[id(p)] = _placeholder(p, tensors[name].dtype, device)
    for owner in module.modules():
        for name, held in owner._parameters.items():
            if held is not None:
                replaced.append((owner, name, held))
                owner._parameters[name] = made[id(held)]
    return replaced


def _placeholder(p: nn.Parameter, dtype: torch.dtype, device: torch.device) -> nn.Parameter:
    empty = torch.empty(p.shape, dtype=dtype, device=device)
    empty.untyped_storage().resize_(0)
    new = nn.Parameter(empty, requires_grad=False)
    if type(p) is not nn.Parameter and issubclass(type(p), nn.Parameter):
        new.__class__ = type(p)
    new.__dict__.update(p.__dict__)
    return new
