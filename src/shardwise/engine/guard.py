"""Parameters whose values are elsewhere: reading one is caught, never a wrong number or a crash.

A released parameter keeps its identity, name, shape and hooks; only its class is switched to a guarded one, whose
``__torch_function__`` lets metadata through and stops everything that would read or write values.
(``torch.nn.UninitializedParameter`` switches class the same way.) Switching costs about 0.1 µs per parameter and
nothing while the values are present. Subclasses of ``Parameter`` get a guarded class of their own.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from copy import deepcopy
from functools import cache
from typing import Any, Protocol

import torch
from torch import nn

from shardwise.device import HALF_PRECISION
from shardwise.errors import ReleasedParameterError, UnitError
from shardwise.tiers.metadata_access import METADATA_ATTRIBUTES, METADATA_METHODS, accessed

_METADATA = METADATA_ATTRIBUTES | {
    "grad_dtype", "name", "retains_grad", "output_nr", "_backward_hooks", "_post_accumulate_grad_hooks",
}  # fmt: skip
_METHODS = METADATA_METHODS | {
    "stride", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "is_contiguous",
    "storage_offset", "_is_view", "is_distributed", "retain_grad", "_has_compatible_shallow_copy_type",
    "__dir__", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
}  # fmt: skip
_CONVERSIONS = ("to", "type", "half", "float", "double", "bfloat16", "cuda", "cpu", "xpu")
_DTYPES = {"half": torch.float16, "float": torch.float32, "double": torch.float64, "bfloat16": torch.bfloat16}


class Owner(Protocol):
    """Who answers for a parameter: its unit."""

    label: str

    @property
    def taking_handles(self) -> bool:
        """Is somebody taking ``param.detach()`` as a place to put the true value later (``state_dict()``)?"""

    def detached(self, param: nn.Parameter) -> torch.Tensor | None:
        """What stands for ``param.detach()`` for as long as nobody uses it; ``None``: somebody uses the values."""

    def access(self, param: nn.Parameter, operation: str, operands: Any = ()) -> None:
        """Somebody uses the values: have them here when this returns, or raise.

        Args:
            operands: of the operation, in nests: what else must stay here for it.
        """

    def saving(self) -> AbstractContextManager[Any]:
        """Around what is done with the values, for what autograd saves of them."""

    def save_in_fp32(self) -> bool:
        """Have a state dict in fp32 and compute on in half precision. Can it do that?"""

    def is_copied(self, memo: Any) -> bool:
        """Is this a ``copy.deepcopy`` of the whole model, which gives the copy values of its own?"""


class Guard:
    """What guarded classes have beside their parameter's class."""

    _shardwise_unit: Owner
    _shardwise_name: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, metadata_only = accessed(func, _METADATA, _METHODS)
        if metadata_only:  # most calls: loops over parameters ask for many gradients and shapes
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        used: dict[int, Owner] = {}
        for param in _find((args, kwargs)):
            owner: Owner = param._shardwise_unit
            if name == "__repr__":
                return f"GuardedParameter({param._shardwise_name}, shape={tuple(_plain(param.size))}, released)"
            if name == "detach":
                if owner.taking_handles:
                    continue
                if (stands := owner.detached(param)) is not None:
                    return stands
            if name == "data" and len(args) == 2 and args[0] is args[1]:  # after a conversion that changes nothing
                return None
            try:
                owner.access(param, name, (args, kwargs))
            except ReleasedParameterError:
                if name in _CONVERSIONS and param is args[0] and _stays(param, owner, name, args[1:], kwargs):
                    return param
                raise
            used[id(owner)] = owner
        with ExitStack() as stack:
            for unit in used.values() if torch.is_grad_enabled() else ():
                stack.enter_context(unit.saving())
            stack.enter_context(torch._C.DisableTorchFunctionSubclass())
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        if id(self) in memo:
            return memo[id(self)]
        unit = self._shardwise_unit
        base = type(self).__mro__[2]
        if not unit.is_copied(memo):
            unit.access(self, "__deepcopy__")  # type: ignore[arg-type]
            return base.__deepcopy__(self, memo)  # type: ignore[attr-defined]
        with torch._C.DisableTorchFunctionSubclass():  # a shape without bytes, until its unit is copied
            shell = torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)  # type: ignore[attr-defined]
            copy = nn.Parameter(shell, self.requires_grad)  # type: ignore[attr-defined]
            copy.__class__ = base
        memo[id(self)] = copy
        if base is not nn.Parameter:  # such as quantised ones, which say in attributes what their bytes mean
            own = {k: v for k, v in vars(self).items() if not k.startswith("_shardwise_")}
            copy.__dict__.update(deepcopy(own, memo))
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._shardwise_unit.access(self, "__reduce_ex__")  # type: ignore[arg-type]
        return super().__reduce_ex__(protocol)


class GuardedParameter(Guard, nn.Parameter):
    """A parameter whose values are released (or still arriving)."""


@cache
def _guarded(kind: type[torch.Tensor]) -> type[torch.Tensor]:
    """The guarded class of a class of parameters."""
    if kind is nn.Parameter:
        return GuardedParameter
    meta: Any = type(kind)
    return meta(f"Guarded{kind.__name__}", (Guard, kind), {"__module__": kind.__module__})


def _plain(call: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return call()


def _find(tree: Any) -> Iterable[Any]:
    if isinstance(tree, Guard):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _find(item)
    elif isinstance(tree, dict):
        yield from _find(list(tree.values()))


def _stays(param: torch.Tensor, owner: Owner, name: str, args: Any, kwargs: Any) -> bool:
    """Does a conversion, such as one by ``Module.to``, leave a released parameter as it is?"""
    device: Any
    if name == "cpu" or name in _DTYPES:
        device, dtype = ("cpu" if name == "cpu" else None), _DTYPES.get(name)
    elif name == "to" and "copy" not in kwargs and not any(isinstance(a, Guard) for a in args):
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if memory_format is not None:
            return False
    else:
        return False
    with torch._C.DisableTorchFunctionSubclass():
        if device is not None and torch.empty(0, device=device).device != param.device:
            return False
        return dtype is None or dtype == param.dtype or widen_saved(owner, param.dtype, dtype)


def widen_saved(unit: Owner, dtype: torch.dtype, wanted: torch.dtype) -> bool:
    """Take a conversion of a sharded parameter from half precision to fp32, as scripts do before they save: its values
    stay as they are, and from here on state dicts have them in fp32.

    Returns:
        Was it one? Otherwise nothing has happened.
    """
    return wanted is torch.float32 and dtype in HALF_PRECISION and unit.save_in_fp32()


def guard(params: Iterable[torch.Tensor]) -> None:
    """Switch parameters to their guarded class."""
    for p in params:
        kind = type(p)
        if kind is nn.Parameter:
            p.__class__ = GuardedParameter
        elif not issubclass(kind, Guard):
            try:
                p.__class__ = _guarded(kind)
            except TypeError as error:
                raise UnitError(
                    f"parameter '{p._shardwise_name}' is a {kind.__name__}, which cannot be released: {error}",  # type: ignore[attr-defined]
                    fix="use ddp, zero1 or zero2 for this model, or plain nn.Parameter",
                ) from error


def unguard(params: Iterable[torch.Tensor]) -> None:
    """Switch guarded parameters back."""
    for p in params:
        kind = type(p)
        if kind is GuardedParameter:
            p.__class__ = nn.Parameter
        elif issubclass(kind, Guard):
            p.__class__ = kind.__mro__[2]


def mark(param: torch.Tensor, unit: Owner, name: str) -> None:
    """Tell a parameter which unit answers for it."""
    param._shardwise_unit = unit  # type: ignore[attr-defined]
    param._shardwise_name = name  # type: ignore[attr-defined]


_DECIDED = "decide dtype and device before: load(dtype=..., device_map=...), or model.to(...) before fully_shard"


def refuse(param: nn.Parameter, operation: str, unit: str) -> ReleasedParameterError:
    name = param._shardwise_name  # type: ignore[attr-defined]
    doing = {
        "__deepcopy__": "copying",
        "__reduce_ex__": "pickling",
        "__get__": "reading",
        "data": "taking .data of",
    }.get(operation, f"'{operation}' on")
    fix = {
        "__deepcopy__": "copy the whole model (copy.deepcopy(model)), or the parameter inside "
        "'with shardwise.gathered(model):'",
        "__reduce_ex__": "save model.state_dict() instead",
        **dict.fromkeys(
            _CONVERSIONS,
            "dtype and device are decided before: shardwise.load(dtype=..., device_map=...), or "
            "model.to(...) before fully_shard",
        ),
    }.get(operation, "wrap the code in 'with shardwise.gathered(module):', or go through the module's forward")
    return ReleasedParameterError(
        f"{doing} parameter '{name}' while its values are released", where=f"unit {unit}", fix=fix
    )
