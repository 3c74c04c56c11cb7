"""Values of parameters that are not sharded yet, put aside: each rank keeps its part of them, and the rest is freed.

So a model that no rank could hold whole can be built by ordinary code, module by module, and keeps every value that
its constructors computed. A parameter that is put aside is guarded, as released ones of a sharded model are: whoever
uses it has its values back first, on every rank, and may write to them. When the model is sharded, a unit's values
are brought together just before it is made.

A parameter is cut into as many equal parts as there are ranks, by its elements in order. Rank 0's values count.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from shardwise.comm import World
from shardwise.comm.group import Group
from shardwise.comm.stats import Op
from shardwise.engine.guard import Guard, guard, mark, unguard
from shardwise.engine.parked_places import Place, View, can_be_parked, is_aliased, votes
from shardwise.engine.unit import unit_of
from shardwise.errors import WriteLost
from shardwise.tiers.home import Home
from shardwise.tiers.ledger import Ledger
from shardwise.tiers.offloaded_values import OffloadedValues
from shardwise.trees import leaves

_VALUES, _WRITES = 5, 6  # tags, below those of units
_FREE, _BUSY, _DEAD = 0, 1, 2  # what a rank says of a parameter: may be put aside, is needed here, is gone
KEEP = 1 << 22
"""Bytes that are left where they are, of what was brought because somebody used it."""


class ParkedValues:
    """The values of some parameters, put aside.

    Args:
        world: who holds the parts.
        where: parts are kept: ``device`` (where the constructor made the values), ``cpu`` or ``nvme``.
        path: a folder on the disk; ``None`` finds one.
        timeout: seconds that a collective may wait.

    Raises:
        OffloadError: there is no such place.
    """

    label = "a model that is being built"
    taking_handles = False

    def __init__(self, world: World, where: str = "device", path: str | None = None, timeout: float = 600.0) -> None:
        self.world, self._timeout = world, timeout
        self._control = world.control_group(timeout)
        self._on = None if where == "device" else torch.device("cpu")
        self._home = Home("nvme", Ledger(), path=path, rank=world.rank) if where == "nvme" else None
        self._places: dict[int, Place] = {}
        self._brought: list[Place] = []  # because somebody used them; the last one at the end
        self.keep = KEEP

    @property
    def useful(self) -> bool:
        """Is less memory needed with it than without?"""
        return self.world.size > 1 or self._home is not None

    # --- putting aside and bringing ----------------------------------------------------------------
    def park(self, params: Iterable[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
        """Put the values of parameters aside; returns those that were not before. Collective.

        Those that somebody has a view of stay, until the next call that can. Other kinds of parameters, empty ones,
        and those without memory or that are sharded are left alone.
        """
        new = []
        for name, p in params:
            place = self._places.get(id(p))
            if place is None and can_be_parked(p):
                place = self._places[id(p)] = Place(p, name)
                place.gone = weakref.finalize(p, self._places.pop, id(p), None)
                place.gone.atexit = False
                new.append(p)
                self._brought.append(place)
        self.settle()
        return new

    @torch.no_grad()
    def settle(self, but: Any = (), keep: int = 0) -> None:
        """Put aside what is here, on all ranks or on none. Collective where there is something.

        Args:
            but: tensors in nests; parameters among them stay.
            keep: so many bytes of what was used last stay.
        """
        stays = {id(t) for t in leaves(but) if isinstance(t, torch.Tensor)}
        some: list[Place] = []
        kept: list[Place] = []
        for place in reversed(self._brought):
            keep -= place.nbytes
            (kept if place.part is not None and keep >= 0 else some).append(place)
        if not some:
            return
        some.reverse()
        found = [place.param() for place in some]
        rows = self._votes([_DEAD if p is None else _BUSY if place.pins or id(p) in stays or is_aliased(p) else _FREE
                            for place, p in zip(some, found, strict=True)])  # fmt: skip
        left: list[Place] = []
        for place, p, said in zip(some, found, rows, strict=True):
            if p is not None and set(said) == {_FREE}:
                self._put(place, p)
            elif set(said) != {_DEAD}:
                left.append(place)
        self._brought = left + kept[::-1]

    def _put(self, place: Place, p: nn.Parameter, source: int = 0) -> None:
        self.take(place, p, source)
        self._free(place, p)

    def _free(self, place: Place, p: nn.Parameter) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            p.data = torch.empty((), dtype=p.dtype, device=p.device).expand(p.shape)
        place.here = False
        mark(p, self, place.name)
        guard([p])

    def take(self, place: Place, p: nn.Parameter, source: int = 0) -> None:
        """One rank's values for everyone; each keeps its part."""
        group = self._group(p.device)
        values = p.detach().contiguous()
        group.broadcast(values.view(-1).view(torch.uint8), self._op(place), source).wait()
        if values.data_ptr() != p.data_ptr():
            p.copy_(values)
        size = self._part_size(p)
        mine = values.view(-1)[group.rank * size : (group.rank + 1) * size]
        part = torch.zeros(size, dtype=p.dtype, device=self._on or p.device)
        part[: mine.numel()].copy_(mine)
        if self._home is None:
            place.part = part
        elif isinstance(place.part, OffloadedValues):
            place.part.materialise()
            place.part.tensor.copy_(part)
            place.part.write_back()
        else:
            place.part = OffloadedValues(self._home, f"parameter '{place.name}'", part, disk=True, state="parameters")
        place.version = p._version

    def bring(self, p: nn.Parameter) -> None:
        """Have the values of a parameter in it. Collective."""
        place = self._places[id(p)]
        if place.here:
            return
        values = self._gathered(place, p, p.device)
        unguard([p])
        p.data = values
        place.here, place.version = True, p._version
        self._brought.append(place)

    @torch.no_grad()
    def _gathered(self, place: Place, p: nn.Parameter, device: torch.device) -> torch.Tensor:
        group, size = self._group(device), self._part_size(p)
        flat = torch.empty(size * group.size, dtype=p.dtype, device=device)
        part = place.part
        assert part is not None
        flat[group.rank * size : (group.rank + 1) * size].copy_(
            part.copied() if isinstance(part, OffloadedValues) else part
        )
        group.all_gather(flat.view(torch.uint8), self._op(place)).wait()
        return flat[: p.numel()].view(p.shape)

    def forget(self, p: nn.Parameter, device: torch.device) -> None:
        """The values of a parameter are its own from here on, on a device."""
        place = self._places.pop(id(p))
        self._brought = [other for other in self._brought if other is not place]
        if place.gone is not None:
            place.gone.detach()
        here = place.here
        values = p.data.to(device) if here else self._gathered(place, p, device)
        unguard([p])
        del place  # with it the weak reference, which a swap would refuse
        for name in ("_shardwise_unit", "_shardwise_name"):
            vars(p).pop(name, None)
        if torch._has_compatible_shallow_copy_type(p, values):
            p.data = values
        else:  # torch keeps tensors of the two types of devices apart
            moved = nn.Parameter(values, requires_grad=p.requires_grad)
            vars(moved).update(vars(p))
            torch.utils.swap_tensors(p, moved)

    # --- blocks that need values -----------------------------------------------------------------------
    @contextmanager
    def here(self, params: Sequence[nn.Parameter], source: int | None) -> Iterator[None]:
        """Have values of parameters in them inside the block. Collective.

        Args:
            source: the rank whose values count when it ends; ``None``: they are read only.

        Raises:
            WriteLost: they were written to, without a ``source``.
        """
        places = [self._places[id(p)] for p in params]
        for place, p in zip(places, params, strict=True):
            self.bring(p)
            place.pins += 1
        try:
            yield
            with torch.no_grad():
                if source is not None:
                    for place, p in zip(places, params, strict=True):
                        self.take(place, p, source)
                else:
                    self._refuse_writes(places)
        except BaseException:
            for place, p in zip(places, params, strict=True):
                place.pins -= 1
                if place.part is not None and not place.pins:
                    self._free(place, p)  # what was written is not taken over
            self._brought = [place for place in self._brought if place.here]
            raise
        for place in places:
            place.pins -= 1
        self.settle()

    def _refuse_writes(self, places: Sequence[Place]) -> None:
        written = ""
        for place in places:
            p = place.param()
            if place.part is None or place.pins > 1 or p is None:
                continue  # a block around this one may take over what was written
            size, rank = self._part_size(p), self.world.rank
            mine = p.detach().reshape(-1)[rank * size : (rank + 1) * size]
            part = place.part.copied() if isinstance(place.part, OffloadedValues) else place.part
            same = torch.equal(mine.view(torch.uint8), part[: mine.numel()].to(mine.device).view(torch.uint8))
            if p._version != place.version or not same:
                written = written or place.name
        if any(self._votes([_BUSY if written else _FREE])[0]):
            raise WriteLost(
                "values were written to where they are only read: an in-place modification that is lost",
                where=f"parameter '{written}'" if written else "on another rank",
                fix="say whose values count: GatheredParameters(params, modifier_rank=0)",
            )

    # --- what a guarded parameter asks of its owner ------------------------------------------------------
    def access(self, param: nn.Parameter, operation: str, operands: Any = ()) -> None:
        """Somebody uses a parameter that is put aside: bring its values, and put others aside for it."""
        self.settle(but=(operands, param), keep=self.keep)
        self.bring(param)

    def detached(self, param: nn.Parameter) -> torch.Tensor | None:
        """A state dict of the model costs nothing, then, until somebody looks at what is in it."""
        return View(param, self._places[id(param)].name, self.label, self._viewed).tensor

    def _viewed(self, p: nn.Parameter, operation: str, operands: Any) -> torch.Tensor:
        """Somebody uses a view of a parameter: what it is a view of."""
        if is_parked(p):
            self.access(p, operation, operands)
        with torch.no_grad():  # of one that is sharded by now it is a copy
            return p.data if not isinstance(p, Guard) and unit_of(p) is None else p.detach().clone()

    def saving(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def save_in_fp32(self) -> bool:
        return False

    def is_copied(self, memo: Any) -> bool:
        return False

    # --- parts ---------------------------------------------------------------------------------------------
    def _group(self, device: torch.device) -> Group:
        return self.world.mesh(device, self.world.size, self._timeout).whole

    def _op(self, place: Place) -> Op:
        return Op("parked", f"parameter '{place.name}' of {self.label}", _VALUES)

    def _part_size(self, p: nn.Parameter) -> int:
        return -(-p.numel() // self.world.size)

    def part_of(self, p: nn.Parameter) -> torch.Tensor | None:
        """This rank's part of a parameter, ``(n,)``, padded; ``None`` where it is on a disk, or was not cut yet."""
        place = self._places.get(id(p))
        return place.part if place is not None and isinstance(place.part, torch.Tensor) else None

    def _votes(self, mine: Sequence[int]) -> list[list[int]]:
        alone = self._control.size == 1 or self.world.fake
        return [[vote] for vote in mine] if alone else votes(mine, self._control, Op("control", self.label, _WRITES))


def parked_in(param: Any) -> ParkedValues | None:
    """Who has put a parameter's values aside; ``None``: nobody."""
    owner = vars(param).get("_shardwise_unit") if isinstance(param, nn.Parameter) else None
    return owner if isinstance(owner, ParkedValues) else None


def is_parked(param: nn.Parameter) -> bool:
    """Are a parameter's values somewhere else at the moment, and to be brought?"""
    return parked_in(param) is not None and isinstance(param, Guard)


def forget_parked(params: Iterable[nn.Parameter], device: torch.device) -> None:
    """Bring what is put aside to a device, for good: whoever calls it keeps the values from here on. Collective."""
    for p in params:
        owner = parked_in(p)
        if owner is not None:
            owner.forget(p, device)
