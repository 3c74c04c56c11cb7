"""Calls of operators that were seen on tensors without values: made again, on tensors that have some, to time them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch.utils._pytree import tree_iter, tree_map

_SLAB = 64 << 20  # bytes that cold tensors are taken from in turn: more than the caches hold
_COPIES = 4  # of a call, on other tensors each
_REPEATS, _MOMENT_S = 60, 0.06  # at most, and seconds after which a few have to do


@dataclass(frozen=True)
class Like:
    """What a tensor looks like.

    Args:
        cold: no cache has it.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    cold: bool = False

    @property
    def nbytes(self) -> int:
        """Of the memory that its elements lie in."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return 0 if 0 in self.shape else (last + 1) * self.dtype.itemsize


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
    def of(cls, func: Any, args: Any, kwargs: Any, cold: Iterable[bool]) -> Call:
        """As it is made now.

        Args:
            cold: of each tensor, in their order.
        """
        turns = iter(cold)

        def seen(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            return Like(tuple(x.shape), tuple(x.stride()), x.dtype, next(turns))

        found = tree_map(seen, (tuple(args), dict(kwargs)))
        return cls(func._schema.name, func._overloadname, *found)

    @property
    def nbytes(self) -> int:
        """Of all its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def tensors(self) -> list[Like]:
        return [leaf for leaf in tree_iter((self.args, self.kwargs)) if isinstance(leaf, Like)]


class Slab:
    """Memory that measurements take their tensors from. Values are about 1 to begin with."""

    def __init__(self, nbytes: int = _SLAB) -> None:
        self._values = torch.rand(nbytes // 4).add_(0.5)
        self._at = 0

    def tensor(self, like: Like, below: int) -> torch.Tensor:
        """One with harmless values; a cold one is of other memory each time.

        Args:
            below: whole numbers, which are places somewhere as a rule, are below it.
        """
        elements = like.nbytes // like.dtype.itemsize
        if not like.dtype.is_floating_point:
            return torch.randint(below, (elements,)).to(like.dtype).as_strided(like.shape, like.stride)
        if not like.cold or like.nbytes > self._values.nbytes // 2:
            values = torch.empty(elements).uniform_(0.5, 1.5).to(like.dtype)
            return values.as_strided(like.shape, like.stride)
        words = -(-like.nbytes // 4)
        if self._at + words > self._values.numel():
            self._at = 0
        values = self._values[self._at : self._at + words].view(like.dtype)
        self._at += -(-words // 32) * 32
        return values.as_strided(like.shape, like.stride)

    def seconds(self, call: Call) -> float | None:
        """Of one call, as in a step. ``None``: it cannot be made by itself.

        Takes up to a fifth of a second, and memory as a few times its tensors.
        """
        space, name = call.name.split("::")
        sizes = [size for x in call.tensors if x.dtype.is_floating_point for size in x.shape if size > 1]
        below, cold = min(sizes, default=1), sum(x.nbytes for x in call.tensors if x.cold)
        # Cold ones have to be so many that the first is cold again when its turn comes.
        copies = _COPIES if not cold else max(_COPIES, min(64, self._values.nbytes // cold))
        warm: list[torch.Tensor] = []

        def make(first: bool) -> Callable[[], Any]:
            turns = iter(warm)

            def made(x: Any) -> Any:
                if not isinstance(x, Like):
                    return x
                if x.cold or first:
                    tensor = self.tensor(x, below)
                    if not x.cold:
                        warm.append(tensor)
                    return tensor
                return next(turns)

            args, kwargs = tree_map(made, (call.args, call.kwargs))
            return lambda: func(*args, **kwargs)

        try:
            func = getattr(getattr(getattr(torch.ops, space), name), call.overload)
            return timed([make(k == 0) for k in range(copies)])
        except (RuntimeError, TypeError, IndexError, AttributeError):  # values decide what it does, or it has a state
            return None


@torch.no_grad()
def timed(calls: list[Callable[[], Any]], least: int = 5) -> float:
    """Seconds of one of these, which take turns: the lower quartile of some times, the first of each apart.

    Args:
        least: times, however long they take. 60 or more are as many times, whatever happens, as ranks need that take
            part in each other's.
    """
    for call in calls:
        call()
    times: list[float] = []
    begun = perf_counter()
    for call in itertools.cycle(calls):
        start = perf_counter()
        call()
        end = perf_counter()
        times.append(end - start)
        if len(times) >= least and (len(times) >= max(least, _REPEATS) or end - begun > _MOMENT_S):
            break
    return statistics.quantiles(times, n=4, method="inclusive")[0]
