"""What other libraries ask a parameter to find out whether its values are split: ``ds_id``, ``ds_status`` and others.

Only parameters whose values come and go have these attributes: those of ``zero3`` and ``hsdp``, and those that
``zero.Init`` has split. The rest are plain parameters to whoever asks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from shardwise.deepspeed.zero.status import ZeroParamStatus, ZeroParamType
from shardwise.engine.engine import Engine
from shardwise.engine.guard import Guard
from shardwise.engine.parked import parked_in
from shardwise.engine.residency import Residency
from shardwise.engine.unit import Unit, unit_of

_numbers = itertools.count()
_ATTRIBUTES = ("ds_id", "ds_shape", "ds_numel", "ds_param_type", "ds_persist", "ds_active_sub_modules")
_LATE = ("ds_status", "ds_tensor")


def mark(model: nn.Module) -> None:
    """Let the parameters of a sharded model, and of copies of it, answer as DeepSpeed's do.

    Does nothing to parameters that stay whole, but take away what ``zero.Init`` gave them.
    """
    units = {id(unit): unit for p in model.parameters() if (unit := unit_of(p)) is not None}
    for engine in {id(unit.upward): unit.upward for unit in units.values()}.values():
        if isinstance(engine, Engine) and _mark_copy not in engine.on_copy:
            engine.on_copy.append(_mark_copy)
    _mark_units(units.values())


def _mark_units(units: Iterable[Unit]) -> None:
    for unit in units:
        for p in unit.params:
            if unit.strategy.split_params:
                _give(p)
                vars(p)["ds_tensor"] = _part(unit, p)
            else:
                _take(p)


def mark_parked(params: Iterable[nn.Parameter]) -> None:
    """The same for parameters of a model that is not sharded yet, and that ``zero.Init`` has split."""
    for p in params:
        _give(p)


def not_marked(module: nn.Module) -> bool:
    """Has a module parameters of its own, with values, that :func:`mark_parked` has not seen?"""
    return any(p is not None and "ds_id" not in vars(p) and not p.is_meta for p in module._parameters.values())


def _mark_copy(old: Engine, new: Engine, memo: object) -> None:
    _mark_units(new.units)


def _give(p: nn.Parameter) -> None:
    own = vars(p)
    with torch._C.DisableTorchFunctionSubclass():
        own.setdefault("ds_id", next(_numbers))
        own.setdefault("ds_active_sub_modules", set())
        own["ds_shape"], own["ds_numel"] = p.shape, p.numel()
        own["ds_param_type"], own["ds_persist"] = ZeroParamType.NORMAL, False
        own["ds_status"] = ZeroParamStatus.AVAILABLE  # while nobody guards it
        own.setdefault("ds_tensor", torch.empty(0, dtype=p.dtype))


def _take(p: nn.Parameter) -> None:
    for name in (*_ATTRIBUTES, *_LATE):
        vars(p).pop(name, None)


def _part(unit: Unit, p: nn.Parameter) -> torch.Tensor:
    """This rank's part of the values, ``(n,)``: the master values themselves, no copy."""
    bucket, index = unit.places[id(p)]
    pieces = bucket.piece_params[index]
    if not pieces:
        return torch.empty(0, dtype=bucket.master_dtype, device=bucket.master.device)
    if bucket.values is not None or (len(pieces) == 1 and pieces[0].dim() == 1 and pieces[0] is not p):
        return pieces[0]  # on a disk: to read it is an error that says so
    start = bucket.pieces[index][0].offset - bucket.held.start  # pieces of neighbouring shards lie end to end
    return bucket.master.detach()[start : start + sum(piece.numel() for piece in pieces)].data


class _Status:
    """``ds_status`` of a guarded parameter, whose values may be away."""

    def __get__(self, p: Any, kind: Any = None) -> Any:
        if p is None:
            return self
        if "ds_id" not in vars(p):
            raise AttributeError(f"'{kind.__name__}' object has no attribute 'ds_status'")
        unit = unit_of(p)
        if unit is None:
            parked = parked_in(p) is not None
            return ZeroParamStatus.NOT_AVAILABLE if parked else ZeroParamStatus.AVAILABLE
        if unit.here and unit.upward.last_gathered is not unit:
            return ZeroParamStatus.AVAILABLE
        coming = unit.residence.state in (Residency.GATHERING, Residency.STAGING)
        return ZeroParamStatus.INFLIGHT if coming else ZeroParamStatus.NOT_AVAILABLE

    def __set__(self, p: Any, value: Any) -> None:
        vars(p)["ds_status"] = value


class _Part:
    """``ds_tensor`` of a guarded parameter: this rank's part, which another tensor may be by now."""

    def __get__(self, p: Any, kind: Any = None) -> Any:
        if p is None:
            return self
        lot = parked_in(p)
        part = None if lot is None else lot.part_of(p)
        if part is not None:
            return part
        if "ds_tensor" not in vars(p):
            raise AttributeError(f"'{kind.__name__}' object has no attribute 'ds_tensor'")
        return vars(p)["ds_tensor"]

    def __set__(self, p: Any, value: Any) -> None:
        vars(p)["ds_tensor"] = value


# A guarded parameter is asked here; one whose values are there has the attribute itself.
Guard.ds_status = _Status()  # type: ignore[attr-defined]
Guard.ds_tensor = _Part()  # type: ignore[attr-defined]
