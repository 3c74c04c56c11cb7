"""From a module and a strategy to an engine with hooked units."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakSet

import torch
from torch import nn

from shardwise import device as devices
from shardwise.comm import Mesh, World, init
from shardwise.comm.stats import Op
from shardwise.comm.world import default_device
from shardwise.engine import activations, hooks, state_dict
from shardwise.engine import optimizer as _optimizer  # installs the optimizer hooks
from shardwise.engine.agreement import require_agreement
from shardwise.engine.deferred import Deferred, InitFn, has_meta
from shardwise.engine.engine import Engine
from shardwise.engine.hooks import ENGINE, engine_of, set_engine
from shardwise.engine.in_backward import InBackward
from shardwise.engine.integrity import Integrity
from shardwise.engine.mixed_precision import compute_dtype, match_inputs
from shardwise.engine.overlaps import refuse_overlaps
from shardwise.engine.parked import forget_parked, parked_in
from shardwise.engine.select import UnitRule, select_units
from shardwise.engine.unit import Unit, unit_of
from shardwise.errors import CommError, OffloadError, UnitError, UpdateFailed
from shardwise.quantization.others import admit
from shardwise.strategy import Strategy
from shardwise.tiers.home import Home

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

M = TypeVar("M", bound=nn.Module)
engines: WeakSet[Engine] = WeakSet()


def shard(
    module: M,
    chosen: Strategy,
    mesh: DeviceMesh | None = None,
    units: UnitRule = None,
    param_init_fn: InitFn | None = None,
    ignored: Collection[nn.Parameter] = (),
) -> M:
    """:func:`shardwise.fully_shard`, with exactly this strategy whatever the launcher said.

    Args:
        ignored: parameters that stay as they are, on each rank.
    """
    if engine_of(module) is not None:
        raise UnitError(f"{type(module).__name__} is sharded already", fix="call fully_shard once per module")
    left = {id(p) for p in ignored}
    params = [(n, p) for n, p in module.named_parameters(remove_duplicate=False) if id(p) not in left]
    _check(module, params, chosen)
    refuse_overlaps(params)
    activations.check(module, chosen)
    device = _device(params)
    adopted = [
        (name, child, sub)
        for name, child in module.named_modules()
        if child is not module and (sub := vars(child).get(ENGINE)) is not None
    ]
    taken = [name for name, _, _ in adopted]
    selected = [
        (name, child)
        for name, child in select_units(module, units)
        if not any(_within(name, t) or _within(t, name) for t in taken)
    ]
    owners = dict(selected)
    owners[""] = module
    world = init(device, timeout=chosen.timeout)
    require_agreement(world, chosen, () if mesh is None else tuple(mesh.mesh.shape), params, owners)
    engine = Engine(module, chosen, mesh_of(world, device, chosen, mesh))
    if chosen.optimizer_in_backward:
        engine.backward.in_backward = InBackward(_optimizer.optimizer_shard)
    of_unit = members_of(params, owners)
    home = _home(engine, device)
    holder = partial(holder_of, module)
    made: dict[str, Unit] = {}

    def make(name: str) -> None:
        forget_parked((p for p, _ in of_unit[name]), device)
        members = [(p, its, compute_dtype(chosen, map(holder, its))) for p, its in of_unit[name]]
        made[name] = Unit(
            name, owners[name], members, holder, engine.mesh, chosen, engine.ledger, home,
            engine,
        )  # fmt: skip

    deferred = Deferred(module, device, param_init_fn) if has_meta(module) else None
    wanted = [name for name in owners if of_unit[name]]
    if deferred is not None:  # a unit is sharded, and its memory freed, as soon as it has values
        for name in deferred.ready({name: _holders(module, of_unit[name]) for name in wanted if name}):
            make(name)
    for name in [*(n for n in wanted if n), ""]:
        if name not in made:
            make(name)
    order = {name: i for i, (name, _) in enumerate(module.named_modules())}
    below = [(name, [unit]) for name, unit in made.items() if name]
    for name, child, sub in adopted:
        _adopt(name, child, sub, engine)
        below.append((name, sub.units))
    registered = [unit for _, group in sorted(below, key=lambda item: order[item[0]]) for unit in group]
    engine.take_over([*registered, made[""]])
    install(engine, made.values(), left)
    return module


def members_of(
    params: Iterable[tuple[str, nn.Parameter]], owners: Collection[str]
) -> dict[str, list[tuple[nn.Parameter, list[str]]]]:
    """Which unit answers for which parameters, each with all its names: the innermost that all of them are in.

    Args:
        params: with every name of tied ones. Those of units that there are already are left out.
        owners: names of units; ``""`` is the root.
    """
    names: dict[int, list[str]] = {}
    objects: dict[int, nn.Parameter] = {}
    for name, p in params:
        names.setdefault(id(p), []).append(name)
        objects[id(p)] = p
    of_unit: dict[str, list[tuple[nn.Parameter, list[str]]]] = {name: [] for name in owners}
    for key, p in objects.items():
        if unit_of(p) is None:
            of_unit[_common_owner(names[key], list(owners))].append((p, names[key]))
    return of_unit


def install(engine: Engine, made: Collection[Unit], left: Collection[int] = ()) -> None:
    """The last steps, when an engine has its units: hooks, buffers, and the mark on the module.

    Args:
        made: units that no engine had before.
        left: parameters (by ``id``) that stay as they are.
    """
    module, chosen = engine.module, engine.strategy
    for unit in made:
        state_dict.install(unit)
    hooks.install(engine)
    activations.install(engine)
    if chosen.autocast:
        match_inputs(holder for unit in made for slot in unit.slots for holder, _ in slot.holders)
    engine.integrity = Integrity(module, left)
    if chosen.broadcast_buffers and engine.world.size > 1:
        engine.send_buffers(0)
    set_engine(module, engine)
    engines.add(engine)
    engine.on_copy.append(_keep_copy)


def _keep_copy(old: Engine, new: Engine, memo: object) -> None:
    engines.add(new)


def _adopt(name: str, child: nn.Module, sub: Engine, engine: Engine) -> None:
    """The units of a child that was sharded before belong to its parent's engine from here on."""
    sub.uninstall()
    prefix = f"{name}."
    for unit in sub.units:
        unit.rename(f"{prefix}{unit.name}" if unit.name else name, prefix)
    _move_ledger(sub, engine)
    engines.discard(sub)
    delattr(child, ENGINE)


def holder_of(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter of that full name, and the attribute."""
    path, _, attribute = name.rpartition(".")
    return root.get_submodule(path), attribute


@atexit.register
def _finish_transfers() -> None:
    """A rank that ends after its last step still owes the others what it is publishing."""
    if World._current is not None and World._current.faults.failed:
        return
    for engine in list(engines):
        try:
            with suppress(CommError):  # the rank we owed it to has ended itself
                for unit in engine.units:
                    if unit.failure is None:
                        unit.finish_transfers()
        except (OffloadError, UpdateFailed) as error:
            print(f"shardwise: the last update did not take place: {error}", file=sys.stderr, flush=True)


def require_engine(module: nn.Module) -> Engine:
    engine = engine_of(module)
    if engine is None:
        raise UnitError(f"{type(module).__name__} is not sharded", fix="call shardwise.fully_shard on it first")
    return engine


@contextmanager
def no_sync(module: nn.Module) -> Iterator[None]:
    """Backwards inside keep their gradients on this rank; the first one outside reduces their sum.

    Keeps a whole gradient (Ψ elements) on each rank meanwhile, also where gradients are split.
    """
    engine = require_engine(module)
    before, engine.sync = engine.sync, False
    try:
        yield
    finally:
        engine.sync = before


def _check(module: nn.Module, params: Sequence[tuple[str, nn.Parameter]], chosen: Strategy) -> None:
    for name, p in params:
        if _is_dtensor(p):
            raise UnitError(
                f"parameter '{name}' is a DTensor already",
                fix="shard the module with one library only; tensor parallelism beside Shardwise is not supported",
            )
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise UnitError(f"parameter '{name}' is uninitialised", fix="run a forward first")
    admit(module, params, comes_and_goes=chosen.split_params or chosen.offload_params != "device")
    devices = {str(p.device) for _, p in params if _has_place(p)}
    if len(devices) > 1:
        raise UnitError(f"the parameters are on several devices: {', '.join(sorted(devices))}", fix="move them to one")


def device_of(module: nn.Module) -> torch.device:
    """Where a module that is not sharded will compute: where its values are, or where this rank computes."""
    return _device(list(module.named_parameters()))


def _device(params: Sequence[tuple[str, nn.Parameter]]) -> torch.device:
    """Where the model computes: where its values are; if it has none yet, where this rank computes."""
    found = next((p.device for _, p in params if _has_place(p)), None)
    if found is not None:
        return found
    if not params:
        return torch.device("cpu")
    return World._current.device if World._current is not None else default_device()


def _has_place(p: nn.Parameter) -> bool:
    """Has it a device of its own? What has no values yet, or has them put aside, comes to be beside the others."""
    return not p.is_meta and parked_in(p) is None


def _holders(root: nn.Module, params: Sequence[tuple[nn.Parameter, list[str]]]) -> list[nn.Module]:
    """The modules that hold any of these parameters themselves."""
    return list({root.get_submodule(name.rpartition(".")[0]) for _, names in params for name in names})


def _is_dtensor(p: nn.Parameter) -> bool:
    """Without importing what takes most of a second: where nobody has imported it, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(p, module.DTensor)


def mesh_of(world: World, device: torch.device, strategy: Strategy, mesh: DeviceMesh | None = None) -> Mesh:
    if strategy.preset == "hsdp":
        size = strategy.shard_size or min(world.local_size, world.size)
    else:
        size = world.size if strategy.split_optimizer else 1
    if mesh is not None:
        if mesh.size() != world.size or mesh.mesh.flatten().tolist() != list(range(world.size)):
            raise UnitError(
                f"the mesh covers ranks {mesh.mesh.flatten().tolist()} of a world of {world.size}",
                fix="give a mesh of all ranks in order: 1-D, or 2-D (replicate, shard)",
            )
        if mesh.ndim == 2:
            size = mesh.mesh.shape[1]
        elif mesh.ndim > 2:
            raise UnitError(f"a mesh of {mesh.ndim} axes", fix="give a 1-D or a 2-D (replicate, shard) mesh")
        if strategy.preset == "ddp" and mesh.ndim == 2 and size != 1:
            raise UnitError("'ddp' has no shard axis", fix="use 'hsdp' with a 2-D mesh")
        if strategy.preset == "ddp":
            size = 1
    return world.mesh(device, size, strategy.timeout)


def _home(engine: Engine, device: torch.device) -> Home | None:
    """Where what the strategy offloads goes, if anything. All ranks have one, or all raise."""
    strategy, world = engine.strategy, engine.world
    homes = {strategy.offload_params, strategy.offload_grads}
    homes.add(strategy.offload_optimizer if strategy.offload_ratio > 0 else "device")
    if homes == {"device"}:
        return None
    home, error = None, None
    try:
        home = Home(
            "nvme" if "nvme" in homes else "cpu",
            engine.ledger,
            path=strategy.nvme_path,
            rank=world.rank,
            buffers=strategy.offload_buffers,
            depth=strategy.offload_depth,
            pin=strategy.pin_memory and devices.can_pin(device),
            checksum=strategy.offload_checksum,
            ratio=strategy.offload_ratio,
            device=device,
            ahead=strategy.offload_prefetch + 1,
            warn=world.rank % max(world.local_size, 1) == 0,
            planned=world.fake,
        )
    except OffloadError as found:
        error = found
    failed = [error is not None] * world.size
    if not world.fake:
        row = torch.zeros(world.size, dtype=torch.uint8)
        row[world.rank] = error is not None
        engine.mesh.control.all_gather(row, Op("control", "the offload homes", 8 * engine.mesh.new_tag())).wait()
        failed = [bool(flag) for flag in row.tolist()]
    if error is not None:
        raise error
    assert home is not None
    if any(failed):
        odd = failed.index(True)
        raise OffloadError(
            f"rank {odd} has no place for what is offloaded",
            where=f"rank {world.rank}",
            fix=f"look at rank {odd}'s own message: its nvme_path is missing, full or not writable",
        )
    # On a CPU device, home ``cpu`` is the device.
    return home if home.separate or home.disk is not None else None


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _common_owner(names: Sequence[str], owners: Sequence[str]) -> str:
    """The innermost owner that contains all names of a (tied) parameter."""
    fitting = [o for o in owners if all(o == "" or n.startswith(o + ".") for n in names)]
    return max(fitting, key=len)


def _move_ledger(old: Engine, new: Engine) -> None:
    """Hand a child's live bytes to its parent's ledger."""
    for state, nbytes in old.ledger.live.items():
        new.ledger.add(state, nbytes - old.ledger.on_host[state])
        new.ledger.add(state, old.ledger.on_host[state], host=True)
    for unit in old.units:
        for b in unit.buckets:
            b.ledger = b.flat.ledger = new.ledger
        if unit.home is not None:
            unit.home.ledger = new.ledger
