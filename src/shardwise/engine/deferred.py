"""Models built on the meta device: memory and values come module by module, as their unit is made.

The whole model therefore never exists, on any rank: one unit does, and what belongs to the root. Modules are visited
children first, in the order they were registered in, which is the order their values are drawn in as a rule. So with
one seed a model gets the values that it has when it is built in memory.

A module may also set what modules inside it hold: many a root draws all values again. A unit is made after the last
module that sets anything in it. Which ones do is found out beforehand, by letting them do it to meta tensors, where it
costs nothing. See :func:`shardwise.engine.resets.rehearse`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn

from shardwise.engine.resets import Slot, Writes, rehearse, slots_in, slots_of
from shardwise.engine.unit import unit_of
from shardwise.errors import ReleasedParameterError, UnitError
from shardwise.quantization.linear import QuantizedLinear

InitFn = Callable[[nn.Module], Any]
_OWN = ("reset_parameters", "_reset_parameters", "_init_weights")  # as torch's layers, and many models, have it


class _Init(NamedTuple):
    """What gives a module's tensors values."""

    run: Callable[[], Any]
    name: str  # in reports


class Deferred:
    """The meta tensors of a model.

    Args:
        root: the model; tensors on another device than ``meta`` stay as they are.
        device: where they come to be.
        init: fills a module's own parameters and buffers, which are uninitialised memory when it is called. ``None``:
            the module's ``reset_parameters()``, or its model's ``_init_weights(module)`` as transformers' models have
            it. What they leave unset is an error.

    Raises:
        UnitError: a module would set what is sharded already.
    """

    def __init__(self, root: nn.Module, device: torch.device, init: InitFn | None) -> None:
        self.device, self.init = device, init
        self._order = list(bottom_up(root))
        self._names = {id(m): name for name, m in root.named_modules()}
        self._by_model: dict[int, InitFn] = {}  # of modules inside one that initialises those in it
        for module in root.modules():
            init_weights: Any = getattr(module, "_init_weights", None)
            if callable(init_weights) and _takes(init_weights, 1):
                self._by_model |= {id(inner): init_weights for inner in module.modules()}
        self._meta = {slot for slot in slots_in(root) if slot.tensor.is_meta}
        self._unset: set[Slot] = set()  # have memory, and no values yet
        self._complete: set[nn.Module] = set()  # known to have all values
        # What a module will set, its own and others', where there are modules with meta tensors inside it.
        self._sets: dict[int, set[Slot]] = {}
        for module in self._order if init is None else ():
            inside = any(slot in self._meta for slot in slots_in(module) if slot.module is not module)
            if inside and (own := self._init_of(module)) is not None:
                self._sets[id(module)] = self._rehearsed(module, own)

    def _rehearsed(self, module: nn.Module, init: _Init) -> set[Slot]:
        sets = rehearse(module, init.run)
        if sets is None:  # it may set anything inside
            return self._meta.intersection(slots_in(module))
        self._refuse_sharded(module, init, sets)
        return sets

    def _refuse_sharded(self, module: nn.Module, init: _Init, sets: Collection[Slot]) -> None:
        found = next((slot for slot in slots_in(module) if slot in sets and unit_of(slot.tensor) is not None), None)
        if found is not None:
            raise self._too_late(module, init, f"'{self._names[id(found.module)]}.{found.name}'")

    def _too_late(self, module: nn.Module, init: _Init, what: str) -> UnitError:
        return UnitError(
            f"{init.name} sets {what}, which is sharded already",
            where=self._where(module),
            fix="call fully_shard once, on the whole model, with units=..."
            if self.init is None
            else "let param_init_fn set what module.parameters(recurse=False) and module.buffers(recurse=False) give",
        )

    def _where(self, module: nn.Module) -> str:
        return f"module '{self._names[id(module)]}' ({type(module).__name__})"

    def _init_of(self, module: nn.Module) -> _Init | None:
        if (init := self.init) is not None:
            return _Init(lambda: init(module), "param_init_fn")
        if isinstance(module, QuantizedLinear):  # a model would draw floating-point numbers into its int8 weight
            return _own_init(module)
        if (by_model := self._by_model.get(id(module))) is not None:
            return _Init(lambda: by_model(module), "_init_weights")
        return _own_init(module)

    # --- in order ------------------------------------------------------------------------------
    def materialise_all(self) -> None:
        """Give the whole model memory and values."""
        list(self.ready({}))

    def ready(self, holders: Mapping[str, Collection[nn.Module]]) -> Iterator[str]:
        """Give the model memory and values; yields the name of each unit as soon as nothing in it will be set again.

        Args:
            holders: per name of a unit, the modules that hold its parameters.

        Raises:
            UnitError: nothing says what some tensors' values are.
        """
        waiting: dict[str, set[int]] = {}
        for name, modules in holders.items():
            slots = {slot for m in modules for slot in slots_of(m)}
            waiting[name] = {id(m) for m in modules} | {m for m, sets in self._sets.items() if sets & slots}
        for module in self._order:
            self.materialise(module)
            for name in [name for name, modules in waiting.items() if id(module) in modules]:
                waiting[name].discard(id(module))
                if not waiting[name]:
                    self._require(holders[name])
                    yield name
        self._require(self._order)

    def materialise(self, module: nn.Module) -> None:
        """Give ``module``'s own meta tensors memory, and them, and what it sets in other modules, values.

        Tensors keep their identity, so ties stay.
        """
        own = slots_of(module)
        fresh = [slot for slot in own if slot.tensor.is_meta]
        for slot in fresh:
            if slot.tensor.is_meta:  # it may have two names
                _give_memory(slot.tensor, self.device)
                _mark(slot.tensor)
        self._unset.update(fresh)
        init = self._init_of(module)
        if init is None or not (fresh or id(module) in self._sets):
            return
        # A tied one has the values of the module that comes first, and keeps them.
        tied = [(s.tensor, s.tensor.detach().clone()) for s in own if s in self._meta and s not in fresh]
        self._run(module, init)
        other = _own_init(module) if init.name == "_init_weights" else None
        if other is not None and any(self._is_left(slot) for slot in fresh):
            self._run(module, other)  # the model leaves to a module what that knows itself
            self._run(module, init)
        with torch.no_grad():
            for tensor, value in tied:
                tensor.copy_(value)

    def _run(self, module: nn.Module, init: _Init) -> None:
        real = [slot for slot in slots_in(module) if slot not in self._meta]
        writes = Writes(module, spare=real)
        try:
            with writes:
                init.run()
        except ReleasedParameterError as error:
            raise self._too_late(module, init, "a parameter") from error
        self._refuse_sharded(module, init, writes.found)
        if lost := writes.replaced.intersection(real):
            raise UnitError(
                f"{init.name} replaces '{next(iter(lost)).name}', which has values already",
                where=self._where(module),
                fix="build all of the model on the meta device, or nothing that this sets",
            )
        for slot in writes.replaced:
            self._keep_identity(slot, writes.before(slot))
        self._unset -= writes.found

    def _keep_identity(self, slot: Slot, old: torch.Tensor) -> None:
        """A parameter that was replaced by another: the old one takes its values over, for optimizers that hold it."""
        new = slot.found
        if new is old or not isinstance(old, nn.Parameter):
            return
        if new is None or new.shape != old.shape or new.dtype != old.dtype:
            raise UnitError(
                f"parameter '{slot.name}' is replaced by one of another kind while its values are set",
                where=self._where(slot.module),
                fix="build the model with the parameters that it will have",
            )
        torch.utils.swap_tensors(old, new)
        slot.module._parameters[slot.name] = old

    def _is_left(self, slot: Slot) -> bool:
        """Has nobody set it, or not all of it?"""
        if slot.found is None or not slot.found.numel():
            return False
        if slot in self._unset and _is_marked(slot.tensor):
            return True
        return self.init is None and _shows_nan(slot.tensor)

    def _require(self, modules: Collection[nn.Module]) -> None:
        for module in modules:
            if module in self._complete:
                continue
            self._complete.add(module)
            left = [slot for slot in slots_of(module) if slot in self._meta and self._is_left(slot)]
            if not left:
                continue
            init = self._init_of(module)
            why = "no values, and nothing that says which" if init is None else f"{init.name} leaves them unset"
            kind = type(module).__name__
            raise UnitError(
                f"{', '.join(repr(slot.name) for slot in left)} on the meta device: {why}",
                where=self._where(module),
                fix=f"give {kind} a reset_parameters() that sets its own parameters and buffers, or "
                "pass fully_shard(..., param_init_fn=...)"
                if self.init is None
                else "let param_init_fn set all parameters and buffers of the module that it is called with",
            )


def _own_init(module: nn.Module) -> _Init | None:
    for name in _OWN:
        own: Any = getattr(module, name, None)
        if callable(own) and _takes(own, 0):
            return _Init(own, name)
    return None


def _takes(function: Callable[..., Any], count: int) -> bool:
    """Can it be called with so many arguments?"""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # it does not say
        return True
    return True


def bottom_up(module: nn.Module, seen: set[int] | None = None) -> Iterator[nn.Module]:
    """All modules once, each after those inside it."""
    seen = set() if seen is None else seen
    seen.add(id(module))
    for child in module.children():
        if id(child) not in seen:
            yield from bottom_up(child, seen)
    yield module


def has_meta(root: nn.Module) -> bool:
    return any(t.is_meta for t in chain(root.parameters(), root.buffers()))


def _give_memory(t: torch.Tensor, device: torch.device) -> None:
    """Replace a meta tensor by uninitialised memory in the same Python object."""
    memory = torch.empty_like(t, device=device)
    if isinstance(t, nn.Parameter):
        fresh: torch.Tensor = nn.Parameter(memory, requires_grad=t.requires_grad)
        fresh.__class__ = type(t)
    else:
        fresh = memory
    fresh.__dict__.update(t.__dict__)
    torch.utils.swap_tensors(t, fresh)


def _unlikely(dtype: torch.dtype) -> float | int | bool | None:
    """A value that shows what nobody sets; ``None``: there is none that could be compared."""
    if dtype.is_complex or (dtype.is_floating_point and dtype.itemsize > 1):
        return torch.nan
    if dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        return torch.iinfo(dtype).max
    return True if dtype == torch.bool else None


@torch.no_grad()
def _mark(t: torch.Tensor) -> None:
    value = _unlikely(t.dtype)
    if value is not None:
        t.fill_(value)


def _is_marked(t: torch.Tensor) -> bool:
    value = _unlikely(t.dtype)
    if value is None:
        return True  # as far as can be told
    return bool((t.isnan() if isinstance(value, float) else t == value).all())


def _shows_nan(t: torch.Tensor) -> bool:
    return isinstance(_unlikely(t.dtype), float) and bool(t.isnan().any())
