"""Models built on the meta device: memory and values come module by module, as their unit is made.

The whole model therefore never exists, on any rank: one unit does, and what belongs to the root. Modules are visited
children first, in the order they were registered in, which is the order their values are drawn in as a rule. So with
one seed a model of torch's own layers gets the values that it has when it is built in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from shardwise.errors import UnitError

InitFn = Callable[[nn.Module], Any]
_OWN = ("reset_parameters", "_reset_parameters")  # as torch's layers call it; the second is MultiheadAttention's


class Deferred:
    """The meta tensors of a model.

    Args:
        root: the model; tensors on another device than ``meta`` stay as they are.
        device: where they come to be.
        init: fills a module's own parameters and buffers, which are uninitialised memory when it is called; it is
            trusted. ``None``: the module's ``reset_parameters()``, or its model's ``_init_weights(module)`` as
            transformers' models have it; what they leave unset is an error.
    """

    def __init__(self, root: nn.Module, device: torch.device, init: InitFn | None) -> None:
        self.device, self.init = device, init
        self._root = root
        self._inits: dict[int, InitFn] = {}  # of modules inside one that initialises those in it
        self._names = {id(m): name for name, m in root.named_modules()}
        for module in root.modules():
            init_weights: Any = getattr(module, "_init_weights", None)
            if callable(init_weights):
                self._inits |= {id(inner): init_weights for inner in module.modules()}

    def materialise_all(self) -> None:
        """Give the whole model memory and values."""
        for module in bottom_up(self._root):
            self.materialise(module)

    def materialise(self, module: nn.Module) -> None:
        """Give ``module``'s own meta tensors memory and values. Tensors keep their identity, so ties stay.

        Raises:
            UnitError: nothing says what their values are.
        """
        fresh = {id(t): name for name, t in _own(module) if t.is_meta}
        if not fresh:
            return
        tied = [(t, t.detach().clone()) for t in module._parameters.values() if t is not None and id(t) not in fresh]
        for _, t in _own(module):
            if id(t) in fresh:
                _give_memory(t, self.device)
        if self.init is not None:
            self.init(module)
        else:
            self._initialise(module, fresh)
        with torch.no_grad():
            for t, value in tied:  # they had values already, of the module that comes first
                t.copy_(value)

    def _initialise(self, module: nn.Module, fresh: dict[int, str]) -> None:
        init = self._inits.get(id(module))
        own = next((f for f in (getattr(module, name, None) for name in _OWN) if callable(f)), None)
        unset = [t for _, t in _own(module) if id(t) in fresh]
        with torch.no_grad():
            for t in unset:
                if t.is_floating_point() or t.is_complex():
                    t.fill_(torch.nan)  # shows what nobody sets
        if init is not None:
            init(module)
        elif own is not None:
            own()
        left = [
            t for t in unset if (init is None and own is None and t.numel()) or (t.numel() and bool(t.isnan().any()))
        ]
        if left:
            names = ", ".join(f"'{fresh[id(t)]}'" for t in left)
            kind = "_init_weights" if init is not None else "reset_parameters"
            raise UnitError(
                f"{names} on the meta device: no values, and nothing that says which"
                if init is None and own is None
                else f"{names} on the meta device: {kind} leaves them unset",
                where=f"module '{self._names[id(module)]}' ({type(module).__name__})",
                fix=f"give {type(module).__name__} a reset_parameters() that sets its own parameters and buffers, or "
                "pass fully_shard(..., param_init_fn=...)",
            )


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


def _own(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, t in chain(module._parameters.items(), module._buffers.items()):
        if t is not None:
            yield name, t


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
