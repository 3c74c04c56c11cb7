"""Parameters whose values are put aside, one by one: see :mod:`shardwise.engine.parked`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from shardwise.comm.group import Group
from shardwise.comm.stats import Op
from shardwise.engine.guard import guard, mark, unguard
from shardwise.tiers.offloaded_values import OffloadedValues


class Place:
    """Where the values of one parameter are.

    Attributes:
        part: this rank's ``(ceil(numel / ranks),)``, in memory or at its home.
        here: they are in the parameter, all of them.
        gone: forgets it when the parameter is dropped.
        pins: blocks that need them there.
        version: of the parameter when they came.
    """

    __slots__ = ("gone", "here", "name", "nbytes", "param", "part", "pins", "version")

    def __init__(self, param: nn.Parameter, name: str) -> None:
        self.param, self.name, self.nbytes = weakref.ref(param), name, param.nbytes
        self.part: torch.Tensor | OffloadedValues | None = None
        self.gone: weakref.finalize[Any, Any] | None = None
        self.here, self.pins, self.version = True, 0, 0


class View:
    """Answers for ``param.detach()``, taken while values are put aside: a view of them from its first use on.

    Args:
        param: it is kept, as a view keeps its memory.
        name, label: for reports.
        values: brings them, for an operation and its operands.
    """

    taking_handles = False

    def __init__(
        self,
        param: nn.Parameter,
        name: str,
        label: str,
        values: Callable[[nn.Parameter, str, Any], torch.Tensor],
    ) -> None:
        self.param, self.label, self._values = param, label, values
        self.tensor = torch.empty((), dtype=param.dtype, device=param.device).expand(param.shape)
        mark(self.tensor, self, name)
        guard([self.tensor])

    def access(self, param: torch.Tensor, operation: str, operands: Any = ()) -> None:
        """Somebody uses it: from here on it is an ordinary view."""
        values = self._values(self.param, operation, operands)
        unguard([param])
        for name in ("_shardwise_unit", "_shardwise_name"):
            vars(param).pop(name, None)
        param.data = values

    def detached(self, param: nn.Parameter) -> torch.Tensor | None:
        return None

    def saving(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def save_in_fp32(self) -> bool:
        return False

    def is_copied(self, memo: Any) -> bool:
        return False


def can_be_parked(p: nn.Parameter) -> bool:
    """Is it a plain parameter with values of its own?"""
    plain = type(p) is nn.Parameter and not p.is_meta and p.layout is torch.strided and p.numel() > 0
    return plain and "_shardwise_unit" not in vars(p)


def is_aliased(p: nn.Parameter) -> bool:
    """Has anybody beside the parameter a view of its memory, or autograd the parameter itself, for a backward?"""
    held: Any = p
    with torch._C.DisableTorchFunctionSubclass():
        storage = p.untyped_storage()
        viewed: int = torch._C._storage_Use_Count(storage._cdata)  # by the parameter, and the object in hand
        return viewed > 2 or bool(held._use_count() > 1)


def votes(mine: Sequence[int], group: Group, op: Op) -> list[list[int]]:
    """What every rank says, 0 to 255, about each of some things."""
    rows = torch.zeros(group.size, len(mine), dtype=torch.uint8)
    rows[group.rank] = torch.tensor(mine, dtype=torch.uint8)
    group.all_gather(rows.view(-1), op).wait()
    columns: list[list[int]] = rows.t().tolist()
    return columns
