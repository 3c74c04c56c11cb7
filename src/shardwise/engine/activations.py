"""Activations: recomputed in backward instead of kept, or kept in host memory, over torch's own facilities for both.

A module keeps its identity, name, class and hooks: what changes is its ``forward`` attribute, in which a
:class:`WrappedForward` stands before the module's own. Hooks therefore run once per call, outside of what is
recomputed, and a unit is gathered when its recomputation begins, because that begins in the backward of the unit.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from shardwise.engine.binding import binding_of
from shardwise.engine.engine import Engine
from shardwise.engine.saved_tensors import SavedTensors, SavedView
from shardwise.engine.uncompiled import uncompiled_itself
from shardwise.errors import StrategyError, UnitError
from shardwise.strategy import Strategy
from shardwise.tiers.saved_tensors import SavedOnHost

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")  # as transformers calls them


class WrappedForward:
    """Stands in ``module.forward`` and calls the module's own. Without a graph to record it does nothing else.

    Attributes:
        recompute: whether backward computes it again, under ``torch.utils.checkpoint`` (not reentrant).
        saved: where what it saves for backward goes; ``None`` leaves it where it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module, self.own = module, module.forward
        self.recompute = False
        self.saved: SavedOnHost | None = None
        functools.update_wrapper(self, self.own, updated=())  # for whoever asks for the signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.own(*args, **kwargs)
        return self.run(args, kwargs) if self.saved is None else _offloaded(self, self.saved, args, kwargs)

    def __deepcopy__(self, memo: Any) -> WrappedForward:
        new = memo[id(self)] = object.__new__(WrappedForward)
        new.module = memo[id(self.module)]
        own: Any = self.own
        bound = getattr(own, "__self__", None) is self.module
        new.own = own.__func__.__get__(new.module) if bound else copy.deepcopy(own, memo)
        new.recompute, new.saved = self.recompute, None
        functools.update_wrapper(new, new.own, updated=())
        return new

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.recompute:
            return self.own(*args, **kwargs)
        if found := _cache_in(args, kwargs):
            bound = binding_of(self.module)
            raise UnitError(
                f"'{found}' is a cache, which the recomputation in backward would fill a second time",
                where=f"unit {bound.unit.label}" if bound is not None else type(self.module).__name__,
                fix="train with use_cache=False (model.config.use_cache = False), or without activation_checkpointing",
            )
        if torch.compiler.is_compiling():  # the compiler puts the recomputation into its own backward
            return checkpoint(self.own, *args, use_reentrant=False, **kwargs)
        return self._checkpointed(args, kwargs)

    def _checkpointed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Tensors are handed to torch one by one, also those in kwargs and lists: it saves them as autograd does, so
        # that they can be on the host meanwhile, and finds one that was changed in place.
        tensors = _Tensors()
        again = tensors.take((args, kwargs))
        now = [(args, kwargs)]  # the first call gets what the caller gave, lists and all
        written = _Written(self.module)

        def call(*given: torch.Tensor) -> Any:
            if now:
                first_args, first_kwargs = now.pop()
                out = self.own(*first_args, **first_kwargs)
                written.compare()
                return out
            second_args, second_kwargs = _put(again, given)
            return self.own(*second_args, **second_kwargs)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _Reusable(functools.partial(self._recomputing, written))

        return checkpoint(call, *tensors.found, use_reentrant=False, context_fn=contexts)

    @contextmanager
    def _recomputing(self, written: _Written) -> Iterator[None]:
        bound = binding_of(self.module)
        if bound is not None and torch._C._current_graph_task_id() != -1:
            # The first sign of this unit's backward as a rule was the gradient of an output; not where what it left
            # elsewhere (an auxiliary loss on the module) is what backward begins with.
            with torch.no_grad():
                bound.backward.enter(bound.unit, None)
        with written.kept():
            yield


def _cache_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The name of an argument that a forward appends keys and values to."""
    for name, value in kwargs.items():
        if value is not None and (name in _CACHES or hasattr(value, "get_seq_length")):
            return name
    return next((type(value).__name__ for value in args if hasattr(value, "get_seq_length")), "")


@uncompiled_itself
def _offloaded(forward: WrappedForward, saved: SavedOnHost, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """In a compiled model the hooks stay outside of what is compiled."""
    with saved.hooks():
        return forward.run(args, kwargs)


def recompute(module: nn.Module) -> bool:
    """Have ``module`` computed again in backward. ``False`` if it is already."""
    forward = _forward_of(module)
    fresh, forward.recompute = not forward.recompute, True
    return fresh


def is_recomputed(module: nn.Module) -> bool:
    """Is it computed again in backward, by :func:`recompute`?"""
    forward = vars(module).get("forward")
    return isinstance(forward, WrappedForward) and forward.recompute


def _forward_of(module: nn.Module) -> WrappedForward:
    forward = vars(module).get("forward")
    if not isinstance(forward, WrappedForward):
        forward = WrappedForward(module)
        object.__setattr__(module, "forward", forward)  # of this module itself, also where it passes attributes on
    return forward


# --- as a strategy asks -----------------------------------------------------------------------------
def install(engine: Engine) -> None:
    """Do with the activations of ``engine``'s units what their strategies say. Units taken over may have their own.

    Recomputed are units below the root that contain no other unit that is: a unit around them would compute them twice.
    Offload begins at the outermost unit that asks for it, the root as a rule, and covers everything inside.
    """
    units, root = engine.units, engine.module
    asking = [u for u in units if u.module is not root and u.strategy.activation_checkpointing]
    around = {outer for u in asking for outer in _around(u.name)}
    for unit in asking:
        if unit.name not in around:
            recompute(unit.module)
    wanted = any(u.strategy.activation_checkpointing for u in units)
    if wanted and not any(is_recomputed(u.module) for u in units):
        engine.refuse_training = _nothing_to_recompute(engine.module)
    _offload(engine)
    engine.on_copy.append(_copy)


def _offload(engine: Engine) -> None:
    units = engine.units
    for unit in units:
        forward = vars(unit.module).get("forward")
        if isinstance(forward, WrappedForward):
            forward.saved = None
    asking = [u for u in units if u.strategy.activation_offload == "cpu"]
    names = {u.name for u in asking}
    outermost = [u for u in asking if not any(outer in names for outer in _around(u.name))]
    devices = {b.device for u in asking for b in u.buckets}
    if outermost and len(devices) == 1:
        saved = SavedOnHost(devices.pop(), engine.ledger, FlatViews(engine.saved), pin=engine.strategy.pin_memory)
        if saved.separate:
            engine.host_activations = saved
            for unit in outermost:
                _forward_of(unit.module).saved = saved


def _copy(old: Engine, new: Engine, memo: Any) -> None:
    """The forwards of a copied model save where those of the model do."""
    if old.host_activations is None:
        return
    saved = SavedOnHost(old.host_activations.link.device, new.ledger, FlatViews(new.saved), pin=new.strategy.pin_memory)
    new.host_activations = saved
    for unit in old.units:
        forward = vars(unit.module).get("forward")
        if isinstance(forward, WrappedForward) and forward.saved is not None:
            memo[id(forward)].saved = saved


class FlatViews:
    """What :class:`SavedOnHost` leaves to the engine: views of flat buffers, which come and go by themselves."""

    def __init__(self, saved: SavedTensors) -> None:
        self.saved = saved

    def pack(self, tensor: torch.Tensor) -> Any:
        """What stands for a view of a flat buffer; ``None``: it is none."""
        return self.saved.pack_view(tensor)

    def unpack(self, packed: Any) -> torch.Tensor:
        """The tensor that :meth:`pack` was given."""
        view: SavedView = packed
        return view.owner.unpack_view(view)


def _around(name: str) -> Iterator[str]:
    """The names of the modules that contain ``name``; the root's is empty."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def check(root: nn.Module, strategy: Strategy) -> None:
    """Before anything is changed.

    Raises:
        StrategyError: the model recomputes activations by itself, as transformers' can.
    """
    for name, module in root.named_modules() if strategy.activation_checkpointing else ():
        if getattr(module, "gradient_checkpointing", None) is True:
            raise StrategyError(
                "activation_checkpointing is on, and the model recomputes its activations by itself",
                where=f"module '{name}'" if name else type(module).__name__,
                fix="model.gradient_checkpointing_disable(), or leave out activation_checkpointing",
            )


def _nothing_to_recompute(module: nn.Module) -> UnitError:
    return UnitError(
        "activation_checkpointing has nothing to recompute: there is no unit below the root",
        where=type(module).__name__,
        fix="name the units: fully_shard(model, units=Block), or leave out activation_checkpointing",
    )


# --- what a recomputation needs ---------------------------------------------------------------------
class _Reusable(AbstractContextManager[None]):
    """A context manager that is made anew each time: a graph that is kept is recomputed in each of its backwards."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        context = self._make()
        context.__enter__()
        self._entered.append(context)

    def __exit__(self, *exc: Any) -> None:
        self._entered.pop().__exit__(*exc)


class _Slot(NamedTuple):
    """Where a tensor was taken from."""

    at: int


class _Tensors:
    """Tensors taken out of arguments, each once: whoever asks if two arguments are the same gets the same answer."""

    def __init__(self) -> None:
        self.found: list[torch.Tensor] = []
        self._index: dict[int, int] = {}

    def take(self, tree: Any) -> Any:
        """The nest with slots for tensors. Parameters stay, and so does what is in other objects."""
        if isinstance(tree, torch.Tensor) and not isinstance(tree, nn.Parameter):
            index = self._index.setdefault(id(tree), len(self.found))
            if index == len(self.found):
                self.found.append(tree)
            return _Slot(index)
        return _rebuilt(tree, self.take)


def _put(tree: Any, tensors: Sequence[torch.Tensor]) -> Any:
    if isinstance(tree, _Slot):
        return tensors[tree.at]
    return _rebuilt(tree, functools.partial(_put, tensors=tensors))


def _rebuilt(tree: Any, change: Callable[[Any], Any]) -> Any:
    if type(tree) in (list, tuple):
        return type(tree)([change(item) for item in tree])
    if type(tree) is dict:
        return {key: change(value) for key, value in tree.items()}
    return tree


class _Written:
    """The buffers that a forward writes to, such as running means: its recomputation must leave them as they are."""

    def __init__(self, module: nn.Module) -> None:
        owners = [m for m in module.modules() if m._buffers]
        self._owners = [m._buffers for m in owners]
        # torch's own kernels for norms write running statistics without counting a version.
        self._silent = [isinstance(m, _NormBase) and m.training for m in owners]
        self._before = [[(key, b, b._version) for key, b in o.items() if b is not None] for o in self._owners]
        self._changed: list[tuple[dict[str, torch.Tensor | None], str]] = []

    def compare(self) -> None:
        """After the forward: which were written to, or replaced?"""
        for owner, silent, before in zip(self._owners, self._silent, self._before, strict=True):
            self._changed += [
                (owner, key) for key, b, version in before if silent or owner.get(key) is not b or b._version != version
            ]
        self._before.clear()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever is done to them inside is undone."""
        held = [(owner, key, owner[key]) for owner, key in self._changed if owner.get(key) is not None]
        values = [b.detach().clone() for _, _, b in held if b is not None]
        try:
            yield
        finally:
            with torch.no_grad():
                for (owner, key, b), value in zip(held, values, strict=True):
                    assert b is not None
                    b.copy_(value)
                    owner[key] = b
