"""Parameters that share memory: two objects over one storage would each get values of its own in a flat buffer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from shardwise.engine.unit import unit_of
from shardwise.errors import UnitError


class _Span(NamedTuple):
    """The bytes of a storage that a parameter reaches over."""

    start: int
    stop: int
    name: str
    param: nn.Parameter


def refuse_overlaps(params: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise for parameters that are views of one another, as ``a.data = b.data`` makes them.

    Views of one storage that have no element in common are fine, and so is one parameter under several names.

    Raises:
        UnitError: which names both, and says how to tie them.
    """
    storages: dict[int, list[_Span]] = {}
    seen: set[int] = set()
    for name, p in params:
        if id(p) not in seen and p.layout == torch.strided and p.numel():
            seen.add(id(p))
            storage, span = _span(name, p)
            storages.setdefault(storage, []).append(span)
    for spans in storages.values():
        if len(spans) > 1:
            _compare(sorted(spans, key=lambda s: s.start))


def _compare(spans: list[_Span]) -> None:
    for k, one in enumerate(spans):
        for other in spans[k + 1 :]:
            if other.start >= one.stop:
                break
            if unit_of(one.param) is not None and unit_of(other.param) is not None:
                continue  # both are sharded already
            if _common(one.param, other.param):
                raise _refusal(one, other)


def _refusal(one: _Span, other: _Span) -> UnitError:
    same = one[:2] == other[:2] and one.param.shape == other.param.shape
    apart = "give each memory of its own (.data.clone())"
    if same:
        return UnitError(
            f"parameters '{one.name}' and '{other.name}' are two objects over the same memory",
            fix=f"tie them by assigning the parameter itself ({other.name} = {one.name}), or {apart}",
        )
    return UnitError(
        f"parameters '{one.name}' and '{other.name}' overlap in memory",
        fix=f"{apart}, or keep one and make the other from it in forward",
    )


def _span(name: str, p: nn.Parameter) -> tuple[int, _Span]:
    with torch._C.DisableTorchFunctionSubclass():  # of parameters that are sharded, too
        start, stop = _elements(p)
        size = p.element_size()
        return p.untyped_storage()._cdata, _Span(start * size, stop * size, name, p)


def _elements(p: nn.Parameter) -> tuple[int, int]:
    """The range of its storage, in elements, that a parameter reaches over."""
    start = int(p.storage_offset())
    return start, start + sum((int(n) - 1) * int(step) for n, step in zip(p.shape, p.stride(), strict=True)) + 1


def _common(one: nn.Parameter, other: nn.Parameter) -> bool:
    """Have they an element in common? Their spans overlap."""
    with torch._C.DisableTorchFunctionSubclass():
        if (one.is_contiguous() and other.is_contiguous()) or one.dtype != other.dtype:
            return True
        stop = max(_elements(p)[1] for p in (one, other))
        places = torch.arange(stop)
        mine, theirs = (places.as_strided(p.shape, p.stride(), p.storage_offset()) for p in (one, other))
        return bool(torch.isin(mine, theirs).any())
