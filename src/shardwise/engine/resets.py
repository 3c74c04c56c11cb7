"""Which tensors of a model an initialisation sets: seen while it runs, or found out beforehand on the meta device."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise import device as devices


class Slot(NamedTuple):
    """A parameter or buffer of a module, by name: the tensor itself may be replaced."""

    module: nn.Module
    name: str

    @property
    def tensor(self) -> torch.Tensor:
        found = self.found
        assert found is not None
        return found

    @property
    def found(self) -> torch.Tensor | None:
        parameter = self.module._parameters.get(self.name)
        return self.module._buffers.get(self.name) if parameter is None else parameter


def slots_of(module: nn.Module) -> list[Slot]:
    """The module's own parameters and buffers."""
    named = chain(module._parameters.items(), module._buffers.items())
    return [Slot(module, name) for name, tensor in named if tensor is not None]


def slots_in(module: nn.Module) -> list[Slot]:
    """Those of the module and of all modules inside it. Tied ones have several."""
    return [slot for inner in module.modules() for slot in slots_of(inner)]


def _storage(tensor: torch.Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():  # of parameters that are sharded, too
        return tensor.untyped_storage()._cdata


class Writes(TorchDispatchMode):
    """A context: afterwards it knows what happened to the parameters and buffers in ``module``.

    Args:
        module: it and the modules inside it.
        spare: slots whose tensors are left as they are: writes to them are noted, and not made.

    Attributes:
        replaced: slots that hold another tensor than before, or whose tensor has other memory.
        found: these, and those that were written to.
    """

    def __init__(self, module: nn.Module, spare: Collection[Slot]) -> None:
        super().__init__()
        self.found: set[Slot] = set()
        self.replaced: set[Slot] = set()
        self._before = {slot: (slot.tensor, _storage(slot.tensor)) for slot in slots_in(module)}
        self._storages = {storage for _, storage in self._before.values()}
        self._spared = {self._before[slot][1] for slot in spare}
        self._written: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = list(_written(func, args, kwargs))
        known = self._storages.intersection(map(_storage, written))
        self._written |= known
        if known & self._spared:
            returns = len(func._schema.returns)
            return None if returns == 0 else written[0] if returns == 1 else tuple(written)
        return func(*args, **kwargs)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for slot, (tensor, storage) in self._before.items():
            if slot.found is not tensor or _storage(tensor) != storage:
                self.replaced.add(slot)
            elif storage in self._written:
                self.found.add(slot)
        self.found |= self.replaced

    def note(self, tensor: torch.Tensor) -> None:
        """Count a tensor as written to."""
        self._written.add(_storage(tensor))

    def before(self, slot: Slot) -> torch.Tensor:
        """What a slot held before."""
        return self._before[slot][0]


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[torch.Tensor]:
    """The tensors that an operation writes to, by its schema."""
    for k, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[k] if k < len(args) else kwargs.get(argument.name)
        for tensor in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(tensor, torch.Tensor):
                yield tensor


def rehearse(module: nn.Module, init: Callable[[], Any]) -> set[Slot] | None:
    """Find out which tensors ``init`` sets, while those it is about are still on the meta device.

    Nothing is changed: random states and the modules are put back, real tensors are not written to.

    Returns:
        The slots, and some more where ``init`` asks on which device a tensor is. ``None`` where it cannot be done to
        meta tensors (it reads values, say).
    """
    writes = Writes(module, [slot for slot in slots_in(module) if not slot.tensor.is_meta])
    with _put_back(module), _random_put_back(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with writes, _Asked(writes.note):
                init()
        except Exception:  # noqa: BLE001  (whatever it is: it shows itself when the values are set)
            return None
    return writes.found


class _Asked(TorchFunctionMode):
    """Who asks where a tensor is may do something else to a real one: some of ``torch.nn.init`` leaves meta ones."""

    def __init__(self, note: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.Tensor.is_meta.__get__, torch.Tensor.device.__get__):  # type: ignore[attr-defined]
            self._note(args[0])
        return func(*args, **(kwargs or {}))


@contextmanager
def _put_back(module: nn.Module) -> Iterator[None]:
    """Attributes, parameters, buffers and children of a module and of those inside it are what they were."""
    inner = list(module.modules())
    tables: list[dict[str, Any]] = [t for m in inner for t in (vars(m), m._parameters, m._buffers, m._modules)]
    before = [dict(table) for table in tables]
    with torch._C.DisableTorchFunctionSubclass():
        data = [(slot.tensor, slot.tensor.data) for slot in slots_in(module)]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)
        for tensor, memory in data:
            if _storage(tensor) != _storage(memory):
                tensor.data = memory


@contextmanager
def _random_put_back() -> Iterator[None]:
    """Random numbers that are drawn inside are drawn again after it."""
    state, numpy = random.getstate(), sys.modules.get("numpy")
    numpys = numpy.random.get_state() if numpy is not None else None
    with devices.fork_rng():
        try:
            yield
        finally:
            random.setstate(state)
            if numpy is not None:
                numpy.random.set_state(numpys)
