"""Is the model still the one that was sharded? Asked before each forward of the root, and before each step.

Units train the parameters they were made with. One that was replaced, converted or added since would be computed with
and never reduced or updated: the commonest way in which a model silently does not train. What can be taken over is
(new values under the same dtype and shape, as ``p.data = ...`` gives them); the rest is an error that names it.

Cost: about 0.1 µs per module and parameter, and as much again per parameter whose place is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from operator import attrgetter, eq, is_, methodcaller
from typing import Any

import torch
from torch import nn

from shardwise.engine.bucket import Bucket
from shardwise.engine.guard import mark, widen_saved
from shardwise.engine.unit import Slot, Unit
from shardwise.errors import UnitError

_PARAMS, _BUFFERS, _CHILDREN = map(attrgetter, ("_parameters", "_buffers", "_modules"))


class _Table:
    """One kind of attribute of all modules: dicts of what they own. Asked about all at once, for speed.

    Args:
        kind: gives the dict of a module.
        known: what was in them, end to end.
    """

    def __init__(self, modules: list[nn.Module], kind: Callable[[Any], dict[str, Any]], known: list[Any]) -> None:
        self._modules, self._kind, self.known = modules, kind, known
        self._dicts: list[dict[str, Any]] = []  # made when first asked: a copy's modules are not complete before
        self._views: list[Iterable[Any]] = []  # which show what is there whenever asked

    @property
    def same(self) -> bool:
        """Are they as they were?"""
        if not self._dicts:
            self._dicts = list(map(self._kind, self._modules))
            self._views = [owned.values() for owned in self._dicts if owned]
        return (
            all(map(is_, map(self._kind, self._modules), self._dicts))
            and sum(map(len, self._dicts)) == len(self.known)
            and all(map(is_, chain.from_iterable(self._views), self.known))
        )


class _Seen:
    """Modules as they were when the model was sharded.

    Args:
        modules: all of them.
        params, children: of each in turn, end to end.
    """

    def __init__(self, modules: list[nn.Module], params: list[Any], children: list[Any]) -> None:
        self.modules = modules
        self._params, self._children = _Table(modules, _PARAMS, params), _Table(modules, _CHILDREN, children)

    @classmethod
    def of(cls, root: nn.Module) -> _Seen:
        modules = list(root.modules())
        return cls(modules, list(_all(modules, _PARAMS)), list(_all(modules, _CHILDREN)))

    @property
    def params(self) -> list[Any]:
        return self._params.known

    @property
    def children(self) -> list[Any]:
        return self._children.known

    @property
    def same(self) -> bool:
        """Are they as they were?"""
        return self._params.same and self._children.same


def _all(modules: Iterable[nn.Module], kind: Callable[[Any], dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(methodcaller("values"), map(kind, modules)))


class _Places:
    """Where the parameters of units were. Those that stay are asked about all at once, for speed."""

    def __init__(self, units: Iterable[Unit]) -> None:
        self._all = [(unit, b) for unit in units for b in unit.buckets]
        self._coming = [(unit, b) for unit, b in self._all if not b.fixed]
        self._params: list[nn.Parameter] = []
        self._addresses: list[int] = []
        for b in (b for _, b in self._all if b.fixed):
            start = b.flat.tensor.data_ptr()
            self._params += [b.params[i] for i, _ in b.offsets]
            self._addresses += [start + at for _, at in b.offsets]

    @property
    def suspects(self) -> list[tuple[Unit, Bucket]]:
        """Buckets whose parameters have to be looked at one by one."""
        params = self._params
        with torch._C.DisableTorchFunctionSubclass():
            still = all(map(eq, map(torch.Tensor.data_ptr, params), self._addresses))
            still = still and all(map(torch.Tensor.is_contiguous, params))
        return self._coming if still else self._all


class Integrity:
    """What a model looked like when it was sharded.

    Args:
        root: the model.
        ignored: parameters (by ``id``) that are no unit's, on purpose.
    """

    def __init__(self, root: nn.Module, ignored: Iterable[int] = ()) -> None:
        self.root, self.ignored = root, frozenset(ignored)
        self._places: _Places | None = None
        self.look()

    def look(self) -> None:
        """From here on, the model is as it is now."""
        self._seen = _Seen.of(self.root)

    @property
    def buffers(self) -> list[torch.Tensor]:
        """As ``root.buffers()`` has them, without a walk through the modules: they are the same as at the last look."""
        found = _all(self._seen.modules, _BUFFERS)
        return list({id(b): b for b in found if b is not None}.values())

    def copied(self, of: Callable[[Any], Any]) -> Integrity:
        """The same of a copy of the model; ``of`` gives the copy of a module or parameter."""
        new = object.__new__(Integrity)
        seen = self._seen
        ignored = [p for p in seen.params if p is not None and id(p) in self.ignored]
        new.root, new.ignored, new._places = of(self.root), frozenset(id(of(p)) for p in ignored), None
        params, children = ([None if x is None else of(x) for x in found] for found in (seen.params, seen.children))
        new._seen = _Seen([of(module) for module in seen.modules], params, children)
        return new

    def check(self, units: Sequence[Unit]) -> None:
        """Compare, and take over what can be.

        Raises:
            UnitError: a parameter was converted, replaced or added since the model was sharded.
        """
        if not self._seen.same:
            self._changed(units)
        if self._places is None:
            self._places = _Places(units)
        for unit, b in self._places.suspects:
            for i in b.moved():
                with torch._C.DisableTorchFunctionSubclass():
                    self._moved(unit, next(s for s in unit.slots if s.bucket is b and s.index == i))

    def _changed(self, units: Sequence[Unit]) -> None:
        """Other parameters or submodules than before: every parameter there still has to be some unit's."""
        slots = {id(s.param): s for u in units for s in u.slots}
        before = {tuple(n.rpartition(".")[::2]) for u in units for s in u.slots for n in s.names}
        frozen = all(b.read_only for u in units for b in u.buckets)
        alone = all(b.mesh.parts == 1 for u in units for b in u.buckets)
        for full, p in self.root.named_parameters(remove_duplicate=False):
            if id(p) in slots or id(p) in self.ignored:
                continue
            where = full.rpartition(".")[0]
            module = self.root.get_submodule(where)
            known = tuple(full.rpartition(".")[::2]) in before
            if frozen and not known and (alone or not p.requires_grad):
                continue  # an adapter beside weights that nobody trains: its gradients are its own
            raise UnitError(
                f"parameter '{full}' was {'replaced' if known else 'added'} after the model was sharded, so no unit "
                "would train it",
                where=f"module '{where}' ({type(module).__name__})" if where else type(module).__name__,
                fix="write into the one that is there (inside 'with shardwise.gathered(model, write=True):' under "
                "zero3 and hsdp), or change the model before it is sharded",
            )
        self.look()  # tensors that are no parameters, modules without any, or some were taken out

    def _moved(self, unit: Unit, slot: Slot) -> None:
        """The parameter is no view of its flat buffer any more: ``p.data = ...`` or a conversion."""
        b, p = slot.bucket, slot.param
        name = b.names[slot.index]
        place = b.layout.slots[slot.index]
        fits = p.dtype == b.dtype and p.device == b.device and tuple(p.shape) == place.shape
        if self._widened(slot):
            return
        if not fits or p.is_meta:
            what = (
                f"converted to {p.dtype} (it was {b.dtype})"
                if p.dtype != b.dtype
                else f"moved to {p.device} (it was on {b.device})"
                if p.device != b.device
                else f"given the shape {tuple(p.shape)} (it had {place.shape})"
            )
            raise UnitError(
                f"parameter '{name}' was {what} after the model was sharded",
                where=f"unit {unit.label}",
                fix="convert or move the model before it is sharded; to compute in another dtype, "
                "Strategy(..., param_dtype='bf16')",
            )
        unit.finish_transfers()
        if not unit.here:
            raise UnitError(
                f"parameter '{name}' was given other memory while its values were released",
                where=f"unit {unit.label}",
                fix="write to it inside 'with shardwise.gathered(module, write=True):'",
            )
        with torch.no_grad():
            b.flat.tensor[place.offset : place.stop].view(place.shape).copy_(p.detach())
        b.attach(slot.index, p)
        mark(p, unit, name)
        b.take_values()
        if b.placement.released and b.mesh.shard.size > 1:
            # Here for a while only: each rank keeps its own shard of what it was given.
            b.note()

    @staticmethod
    @torch.no_grad()
    def _widened(slot: Slot) -> bool:
        """Was the parameter converted to fp32, and is otherwise as it was? Then it is put back."""
        b, p = slot.bucket, slot.param
        place = b.layout.slots[slot.index]
        if p.dtype == b.dtype or p.device != b.device or tuple(p.shape) != place.shape or not slot.unit.here:
            return False
        values = b.flat.tensor[place.offset : place.stop].view(place.shape)
        if not torch.equal(p.detach(), values.to(p.dtype)) or not widen_saved(slot.unit, b.dtype, p.dtype):
            return False
        b.attach(slot.index, p)
        mark(p, slot.unit, b.names[slot.index])
        return True
