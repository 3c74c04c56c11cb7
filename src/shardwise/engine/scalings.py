"""What reduced gradients were multiplied by since they were reduced, so that they can cross a link as they were.

A gradient that is updated on the host crosses the link in the compute dtype, in half the bytes. By then it may have
been multiplied: loss scaling is taken out of it, and clipping scales it down. In fp16 that loses the small ones, for
which the loss was scaled. So they are divided by those factors as they leave, which gives what was reduced, and the
host multiplies them in the master dtype, one factor after the other, as the device did.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch


class Scaling(NamedTuple):
    """A number that gradients were multiplied by, or divided."""

    by: torch.Tensor | float
    divide: bool = False


class Scalings:
    """Of the gradients of one bucket.

    Args:
        count: parameters.
    """

    def __init__(self, count: int) -> None:
        self._done: list[list[Scaling]] = [[] for _ in range(count)]

    def add(self, index: int, by: torch.Tensor | float, divide: bool = False) -> None:
        """Gradient ``index`` was multiplied by (divided by) a number. Of tensors, the same object for all of them."""
        self._done[index].append(Scaling(by, divide))

    def forget(self, index: int | None = None) -> None:
        """Gradient ``index``, or each, is new, or was changed otherwise: it crosses as it is."""
        for done in self._done if index is None else (self._done[index],):
            done.clear()

    def common(self, indices: Iterable[int]) -> tuple[Scaling, ...]:
        """What all of these were multiplied by, in order; nothing if they differ."""
        first: list[Scaling] | None = None
        for index in indices:
            done = self._done[index]
            if first is not None and not _same(first, done):
                return ()
            first = done
        return tuple(first or ())


class Unasked(Scalings):
    """Of gradients that never cross a link: nobody will ask."""

    def __init__(self) -> None:
        super().__init__(0)

    def add(self, index: int, by: torch.Tensor | float, divide: bool = False) -> None:
        return

    def forget(self, index: int | None = None) -> None:
        return

    def common(self, indices: Iterable[int]) -> tuple[Scaling, ...]:
        return ()


def _same(a: Sequence[Scaling], b: Sequence[Scaling]) -> bool:
    return len(a) == len(b) and all(
        x.divide == y.divide
        and (x.by is y.by or (isinstance(x.by, float) and isinstance(y.by, float) and x.by == y.by))
        for x, y in zip(a, b, strict=True)
    )


def lowered(grads: torch.Tensor, scalings: Sequence[Scaling], dtype: torch.dtype) -> torch.Tensor:
    """``grads`` as they were before the scalings, in ``dtype``; as they are where that cannot be known any more."""
    if not scalings:
        return grads.to(dtype)
    factors = [_factor(by, grads) for by, _ in scalings]
    return torch.mul(grads, _undo(factors, scalings)[0], out=torch.empty_like(grads, dtype=dtype))


def factors_of(scalings: Sequence[Scaling], like: torch.Tensor) -> torch.Tensor | None:
    """The factors that are tensors, 1-D, in the dtype and place of ``like``; ``None`` if there are none."""
    tensors = [_factor(by, like) for by, _ in scalings if isinstance(by, torch.Tensor)]
    return torch.stack(tensors) if tensors else None


def scale_(grads: torch.Tensor, scalings: Sequence[Scaling], found: torch.Tensor | None) -> None:
    """Multiply gradients that were :func:`lowered`, as it was done before.

    Args:
        grads: on the host.
        found: what :func:`factors_of` gave, on the host.
    """
    numbers = iter(found if found is not None else ())
    factors = [next(numbers) if isinstance(by, torch.Tensor) else _factor(by, grads) for by, _ in scalings]
    if factors and _undo(factors, scalings)[1]:
        for factor, (_, divide) in zip(factors, scalings, strict=True):
            grads.div_(factor) if divide else grads.mul_(factor)


def _factor(by: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    if isinstance(by, torch.Tensor):
        return by.detach().reshape(()).to(like.device, like.dtype)
    return torch.full((), by, dtype=like.dtype, device=like.device)


def _undo(factors: Sequence[torch.Tensor], scalings: Sequence[Scaling]) -> tuple[torch.Tensor, torch.Tensor]:
    """What undoes the scalings, and whether anything does: not of zero, inf or nan. Equal on every device."""
    undo = torch.ones_like(factors[0])
    for factor, (_, divide) in zip(factors, scalings, strict=True):
        undo = undo * factor if divide else undo / factor
    can = torch.isfinite(undo) & (undo != 0)
    return torch.where(can, undo, torch.ones_like(undo)), can
