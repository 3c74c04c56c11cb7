"""Parameters whose values are elsewhere: reading one is caught, never a wrong number or a crash.

A released parameter keeps its identity, name, shape and hooks; only its class is switched to
:class:`GuardedParameter`, whose ``__torch_function__`` lets metadata through and stops everything that
would read or write values. (``torch.nn.UninitializedParameter`` switches class the same way.) Switching
costs about 0.1 µs per parameter and nothing while the values are present.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from shardwise.errors import ReleasedParameterError
from shardwise.tiers.metadata_access import METADATA_ATTRIBUTES, METADATA_METHODS, accessed

if TYPE_CHECKING:
    from shardwise.engine.unit import Unit

_METADATA = METADATA_ATTRIBUTES | {
    "grad_dtype", "name", "retains_grad", "output_nr", "_backward_hooks", "_post_accumulate_grad_hooks",
}  # fmt: skip
_METHODS = METADATA_METHODS | {
    "stride", "requires_grad_", "register_hook", "register_post_accumulate_grad_hook", "is_contiguous",
    "storage_offset", "_is_view", "is_distributed", "retain_grad",
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
}  # fmt: skip


class GuardedParameter(nn.Parameter):
    """A parameter whose values are released (or still arriving)."""

    _shardwise_unit: Unit
    _shardwise_name: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, metadata_only = accessed(func, _METADATA, _METHODS)
        if not metadata_only:
            for param in _find((args, kwargs)):
                if name == "__repr__":
                    return f"GuardedParameter({param._shardwise_name}, shape={tuple(_plain(param.size))}, released)"
                if name == "detach" and param._shardwise_unit.reading_state:
                    continue  # state_dict() takes a handle now; the true values replace it before it returns
                param._shardwise_unit.touch(param, name)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def __deepcopy__(self, memo: Any) -> Any:
        self._shardwise_unit.touch(self, "__deepcopy__")
        return nn.Parameter.__deepcopy__(self, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        self._shardwise_unit.touch(self, "__reduce_ex__")
        return nn.Parameter.__reduce_ex__(self, protocol)


def _plain(call: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return call()


def _find(tree: Any) -> Iterable[GuardedParameter]:
    if isinstance(tree, GuardedParameter):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _find(item)
    elif isinstance(tree, dict):
        yield from _find(list(tree.values()))


def guard(params: Iterable[nn.Parameter]) -> None:
    """Switch plain parameters to the guarded class."""
    for p in params:
        if type(p) is nn.Parameter:
            p.__class__ = GuardedParameter


def unguard(params: Iterable[nn.Parameter]) -> None:
    """Switch guarded parameters back."""
    for p in params:
        if type(p) is GuardedParameter:
            p.__class__ = nn.Parameter  # type: ignore[assignment]


def mark(param: nn.Parameter, unit: Unit, name: str) -> None:
    """Tell a parameter which unit answers for it."""
    param._shardwise_unit = unit  # type: ignore[attr-defined]
    param._shardwise_name = name  # type: ignore[attr-defined]


def refuse(param: nn.Parameter, operation: str, unit: str) -> ReleasedParameterError:
    name = param._shardwise_name  # type: ignore[attr-defined]
    doing = {
        "__deepcopy__": "copying",
        "__reduce_ex__": "pickling",
        "__get__": "reading",
        "data": "taking .data of",
    }.get(operation, f"'{operation}' on")
    fix = (
        "copy the module before sharding it and shard the copy too (for EMA: update it inside "
        "'with shardwise.gathered(model):')"
        if operation in ("__deepcopy__", "__reduce_ex__")
        else "wrap the code in 'with shardwise.gathered(module):', or go through the module's forward"
    )
    return ReleasedParameterError(
        f"{doing} parameter '{name}' while its values are released", where=f"unit {unit}", fix=fix
    )
