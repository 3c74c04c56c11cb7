"""Calls of operators that were seen on tensors without values: made again, on tensors that have some, to time them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map

_POOL = 48 << 20  # bytes of copies of a call's tensors that take turns: more than the caches hold
_REPEATS, _MOMENT_S = 9, 0.15  # at most, and seconds after which three have to do


@dataclass(frozen=True)
class Like:
    """What a tensor looks like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Like:
        return cls(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Of the memory that its elements lie in."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return 0 if 0 in self.shape else (last + 1) * self.dtype.itemsize

    def made(self, below: int) -> torch.Tensor:
        """One with harmless values: about 1; whole numbers, which are places somewhere as a rule, ``below`` one."""
        elements = self.nbytes // self.dtype.itemsize
        if self.dtype.is_floating_point:
            storage = torch.rand(elements, dtype=torch.float32).add_(0.5).to(self.dtype)
        else:
            storage = torch.randint(below, (elements,)).to(self.dtype)
        return storage.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Call:
    """An operator and its arguments; tensors are told by what they look like.

    Args:
        name, overload: ``aten::mm`` and ``default``.
        args, kwargs: nests, with a :class:`Like` in place of each tensor.
    """

    name: str
    overload: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any) -> Call:
        seen = tree_map(lambda x: Like.of(x) if isinstance(x, torch.Tensor) else x, (tuple(args), dict(kwargs)))
        return cls(func._schema.name, func._overloadname, *seen)

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(tensor.nbytes for tensor in self._tensors)

    @property
    def _tensors(self) -> list[Like]:
        return [leaf for leaf in tree_iter((self.args, self.kwargs)) if isinstance(leaf, Like)]

    def ready(self) -> Callable[[], Any]:
        """What makes the call, on tensors of its own."""
        space, name = self.name.split("::")
        func = getattr(getattr(getattr(torch.ops, space), name), self.overload)
        sizes = [size for x in self._tensors if x.dtype.is_floating_point for size in x.shape if size > 1]
        below = min(sizes, default=1)
        args, kwargs = tree_map(lambda x: x.made(below) if isinstance(x, Like) else x, (self.args, self.kwargs))
        return lambda: func(*args, **kwargs)

    def seconds(self) -> float | None:
        """Of one call, as in a step: on memory that was not used a moment ago. ``None``: it cannot be made so.

        Takes up to a fifth of a second, and memory as a few times its tensors.
        """
        try:
            copies = [self.ready() for _ in range(max(1, min(4, _POOL // max(1, self.nbytes))))]
            return timed(copies)
        except (RuntimeError, TypeError, IndexError, AttributeError):  # values decide what it does, or it has a state
            return None


@torch.no_grad()
def timed(calls: list[Callable[[], Any]], least: int = 3) -> float:
    """Seconds of one of these, which take turns: the lower quartile of some times, the first of each apart.

    Args:
        least: times, however long they take; 9 or more are as many times, whatever happens, as ranks need that take
            part in each other's.
    """
    for call in calls:
        call()
    times: list[float] = []
    begun = perf_counter()
    while len(times) < max(least, _REPEATS) and (len(times) < least or perf_counter() - begun < _MOMENT_S):
        start = perf_counter()
        for call in calls:
            call()
        times.append((perf_counter() - start) / len(calls))
    return statistics.quantiles(times, n=4, method="inclusive")[0]
