"""Is the model still the one that was sharded? Asked before each forward of the root, and before each step.

Units train the parameters they were made with. One that was replaced, converted or added since would be computed with
and never reduced or updated: the commonest way in which a model silently does not train. What can be taken over is
(new values under the same dtype and shape, as ``p.data = ...`` gives them); the rest is an error that names it.

Cost: about 0.3 µs per parameter and module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from shardwise.engine.guard import mark
from shardwise.engine.unit import Slot, Unit
from shardwise.errors import UnitError


class _Seen(NamedTuple):
    """A module as it was when the model was sharded. What it has is kept alive, so that ``ids`` are nobody else's."""

    name: str
    module: nn.Module
    params: tuple[nn.Parameter | None, ...]
    children: tuple[nn.Module | None, ...]
    ids: tuple[tuple[int, ...], tuple[int, ...]]

    @classmethod
    def of(cls, name: str, module: nn.Module) -> _Seen:
        params, children = tuple(module._parameters.values()), tuple(module._modules.values())
        return cls(name, module, params, children, (tuple(map(id, params)), tuple(map(id, children))))


class Integrity:
    """What a model looked like when it was sharded.

    Args:
        root: the model.
        ignored: parameters (by ``id``) that are no unit's, on purpose.
    """

    def __init__(self, root: nn.Module, ignored: Iterable[int] = ()) -> None:
        self.root, self.ignored = root, frozenset(ignored)
        self._seen: list[_Seen] = []
        self.look()

    def look(self) -> None:
        """From here on, the model is as it is now."""
        self._seen = [_Seen.of(name, m) for name, m in self.root.named_modules()]

    def copied(self, of: Callable[[Any], Any]) -> Integrity:
        """The same of a copy of the model; ``of`` gives the copy of a module or parameter."""
        new = object.__new__(Integrity)
        ignored = [p for seen in self._seen for p in seen.params if p is not None and id(p) in self.ignored]
        new.root, new.ignored = of(self.root), frozenset(id(of(p)) for p in ignored)
        new._seen = []
        for seen in self._seen:
            params = tuple(None if p is None else of(p) for p in seen.params)
            children = tuple(None if c is None else of(c) for c in seen.children)
            ids = tuple(map(id, params)), tuple(map(id, children))
            new._seen.append(_Seen(seen.name, of(seen.module), params, children, ids))
        return new

    def check(self, units: Sequence[Unit]) -> None:
        """Compare, and take over what can be.

        Raises:
            UnitError: a parameter was converted, replaced or added since the model was sharded.
        """
        for name, module, _, _, (params, children) in self._seen:
            if tuple(map(id, module._parameters.values())) != params or (
                tuple(map(id, module._modules.values())) != children
            ):
                self._changed(name, module, units)
                break  # it has looked at all of them
        with torch._C.DisableTorchFunctionSubclass():
            for unit in units:
                for b in unit.buckets:
                    key = b.flat.key
                    for i, p in enumerate(b.params):
                        if p.untyped_storage()._cdata != key or not p.is_contiguous():
                            self._moved(unit, next(s for s in unit.slots if s.bucket is b and s.index == i))

    def _changed(self, name: str, module: nn.Module, units: Sequence[Unit]) -> None:
        """Other parameters or submodules than before: every parameter there still has to be some unit's."""
        slots = {id(s.param): s for u in units for s in u.slots}
        before = {tuple(n.rpartition(".")[::2]) for u in units for s in u.slots for n in s.names}
        for full, p in self.root.named_parameters(remove_duplicate=False):
            if id(p) in slots or id(p) in self.ignored:
                continue
            known = tuple(full.rpartition(".")[::2]) in before
            raise UnitError(
                f"parameter '{full}' was {'replaced' if known else 'added'} after the model was sharded, so no unit "
                "would train it",
                where=f"module '{name}' ({type(module).__name__})" if name else type(module).__name__,
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
