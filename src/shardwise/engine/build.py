"""From a module and a strategy to an engine with hooked units."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakSet

import torch
from torch import nn

from shardwise.comm import Mesh, World, init
from shardwise.comm.group import Op
from shardwise.comm.world import default_device
from shardwise.engine import activations, state_dict
from shardwise.engine import optimizer as _optimizer  # installs the optimizer hooks
from shardwise.engine.deferred import Deferred, InitFn, bottom_up, has_meta
from shardwise.engine.in_backward import InBackward
from shardwise.engine.schedule import Engine
from shardwise.engine.select import UnitRule, has_forward, select_units
from shardwise.engine.unit import Unit
from shardwise.errors import CommError, OffloadError, UnitError, UpdateFailed
from shardwise.strategy import Strategy
from shardwise.tiers.home import Home

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

M = TypeVar("M", bound=nn.Module)
_ATTRIBUTE = "_shardwise_engine"
engines: WeakSet[Engine] = WeakSet()


def shard(
    module: M,
    chosen: Strategy,
    mesh: DeviceMesh | None = None,
    units: UnitRule = None,
    param_init_fn: InitFn | None = None,
) -> M:
    """:func:`shardwise.fully_shard`, with exactly this strategy whatever the launcher said."""
    if engine_of(module) is not None:
        raise UnitError(f"{type(module).__name__} is sharded already", fix="call fully_shard once per module")
    params = list(module.named_parameters(remove_duplicate=False))
    _check(module, params)
    activations.check(module, chosen)
    device = _device(params)
    world = init(device, timeout=chosen.timeout)
    engine = Engine(module, chosen, _mesh(world, device, chosen, mesh))
    if chosen.optimizer_in_backward:
        engine.in_backward = InBackward(_optimizer.optimizer_shard)
    adopted = [
        (name, child, sub)
        for name, child in module.named_modules()
        if child is not module and (sub := vars(child).get(_ATTRIBUTE)) is not None
    ]
    taken = [name for name, _, _ in adopted]
    selected = [
        (name, child)
        for name, child in select_units(module, units)
        if not any(_within(name, t) or _within(t, name) for t in taken)
    ]
    owners = dict(selected)
    owners[""] = module
    names: dict[int, list[str]] = {}
    objects: dict[int, nn.Parameter] = {}
    for name, p in params:
        names.setdefault(id(p), []).append(name)
        objects[id(p)] = p
    of_unit: dict[str, list[tuple[nn.Parameter, list[str]]]] = {name: [] for name in [*owners]}
    for key, p in objects.items():
        if getattr(p, "_shardwise_unit", None) is not None:
            continue
        of_unit[_common_owner(names[key], list(owners))].append((p, names[key]))
    home = _home(engine, device)
    made: dict[str, Unit] = {}

    def make(name: str) -> None:
        made[name] = Unit(engine, name, owners[name], of_unit[name], engine.mesh, chosen, engine.ledger, home)

    deferred = Deferred(module, device, param_init_fn) if has_meta(module) else None
    wanted = [name for name in owners if of_unit[name]]
    if deferred is not None:  # a unit is sharded, and its memory freed, as soon as it has values
        holders = {name: _holders(module, of_unit[name]) for name in wanted if name}
        for child in bottom_up(module):
            deferred.materialise(child)
            for name in [name for name, modules in holders.items() if id(child) in modules]:
                holders[name].discard(id(child))
                if not holders[name]:
                    make(name)
    for name in [*(n for n in wanted if n), ""]:
        if name not in made:
            make(name)
    order = {name: i for i, (name, _) in enumerate(module.named_modules())}
    below = [(name, [unit]) for name, unit in made.items() if name]
    for name, _child, sub in adopted:
        sub.uninstall()
        for unit in sub.units:
            unit.name = f"{name}.{unit.name}" if unit.name else name
            unit.label = f"'{unit.name}'"
            unit.names = {k: [f"{name}.{n}" for n in ns] for k, ns in unit.names.items()}
        _move_ledger(sub, engine)
        below.append((name, sub.units))
        engines.discard(sub)
        delattr(_child, _ATTRIBUTE)
    for _, group in sorted(below, key=lambda item: order[item[0]]):
        engine.add(group)
    engine.add([made[""]])
    for unit in made.values():
        state_dict.install(unit)
    engine.install()
    activations.install(engine)
    object.__setattr__(module, _ATTRIBUTE, engine)
    engines.add(engine)
    return module


@atexit.register
def _finish_transfers() -> None:
    """A rank that ends after its last step still owes the others what it is publishing."""
    if World._current is not None and World._current.faults.failed:
        return
    for engine in list(engines):
        try:
            with suppress(CommError):  # the rank we owed it to has ended itself
                for unit in engine.units:
                    if unit.failure is None:  # otherwise somebody has heard of it
                        unit.settle()
        except (OffloadError, UpdateFailed) as error:
            print(f"shardwise: the last update did not take place: {error}", file=sys.stderr, flush=True)


def engine_of(module: nn.Module) -> Engine | None:
    """The engine of a sharded module, also through a wrapper with ``.module``."""
    found = vars(module).get(_ATTRIBUTE)
    if found is None:
        inner = getattr(module, "module", None) if not isinstance(module, nn.ModuleList) else None
        found = vars(inner).get(_ATTRIBUTE) if isinstance(inner, nn.Module) else None
    return found


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


@contextmanager
def gathered(module: nn.Module, *, write: bool = False, grads: bool = False) -> Iterator[None]:
    """Have the whole values of a sharded module, or of a submodule, on every rank.

    Args:
        module: the sharded module, or a module inside one.
        write: take changed values over (rank 0's, for everyone) when the block ends.
        grads: show whole reduced gradients in ``p.grad`` meanwhile. Changes to them are not kept.

    A collective: every rank enters. Costs the module's whole values in memory.
    """
    chosen = {id(u): u for p in module.parameters() if (u := getattr(p, "_shardwise_unit", None)) is not None}
    units: list[Unit] = sorted(chosen.values(), key=lambda u: u.index)
    shown: list[tuple[nn.Parameter, torch.Tensor]] = []
    for unit in units:
        unit.gather()
        unit.kept_for.add("reading")
        if grads:
            for bucket in unit.buckets:
                if not bucket.grads.sharded or all(p.grad is None for p in bucket.params):
                    continue
                full = bucket.grads.full()
                for slot, p in zip(bucket.layout.slots, bucket.params, strict=True):
                    if p.grad is not None:
                        shown.append((p, p.grad))
                        p.grad = full[slot.offset : slot.stop].view(slot.shape)
    try:
        yield
    finally:
        for p, grad in shown:
            p.grad = grad
        with torch.no_grad():
            for unit in units:
                for b in unit.buckets if write else ():
                    b.mesh.whole.broadcast(b.flat.tensor, b.op("broadcast")).wait()
                    if not b.aliased:
                        with b.master_here(write=True) as master:
                            master.copy_(b.flat.tensor[b.held])
                unit.kept_for.discard("reading")
                unit.release()


def _check(module: nn.Module, params: Sequence[tuple[str, nn.Parameter]]) -> None:
    if not has_forward(module):
        raise UnitError(f"{type(module).__name__} has no forward", fix="shard the modules inside it, or their parent")
    for name, p in params:
        if _is_dtensor(p):
            raise UnitError(
                f"parameter '{name}' is a DTensor already",
                fix="shard the module with one library only; tensor parallelism beside Shardwise is not supported",
            )
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise UnitError(f"parameter '{name}' is uninitialised", fix="run a forward first")
    devices = {str(p.device) for _, p in params if not p.is_meta}
    if len(devices) > 1:
        raise UnitError(f"the parameters are on several devices: {', '.join(sorted(devices))}", fix="move them to one")


def _device(params: Sequence[tuple[str, nn.Parameter]]) -> torch.device:
    """Where the model computes: where its values are; if it has none yet, where this rank computes."""
    found = next((p.device for _, p in params if not p.is_meta), None)
    if found is not None:
        return found
    if not params:
        return torch.device("cpu")
    return World._current.device if World._current is not None else default_device()


def _holders(root: nn.Module, params: Sequence[tuple[nn.Parameter, list[str]]]) -> set[int]:
    """The modules (by ``id``) that hold any of these parameters themselves."""
    return {id(root.get_submodule(name.rpartition(".")[0])) for _, names in params for name in names}


def _is_dtensor(p: nn.Parameter) -> bool:
    """Without importing what takes most of a second: where nobody has imported it, there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(p, module.DTensor)


def _mesh(world: World, device: torch.device, strategy: Strategy, mesh: DeviceMesh | None) -> Mesh:
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
            pin=strategy.pin_memory and device.type == "cuda",
            checksum=strategy.offload_checksum,
            ratio=strategy.offload_ratio,
            device=device,
            ahead=strategy.offload_prefetch + 1,
            warn=world.rank % max(world.local_size, 1) == 0,
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
        new.ledger.add(state, nbytes)
    for unit in old.units:
        for b in unit.buckets:
            b.ledger = b.flat.ledger = new.ledger
        if unit.home is not None:
            unit.home.ledger = new.ledger
