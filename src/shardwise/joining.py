"""``join_uneven_inputs``: ranks may run out of data at different times. See :mod:`shardwise.engine.join`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.engine.engine import Engine
from shardwise.engine.hooks import engine_of
from shardwise.engine.join import Join
from shardwise.engine.uneven import uneven_inputs
from shardwise.errors import UnitError
from shardwise.optimizer import AcceleratedOptimizer
from shardwise.stepping import Steps


@contextmanager
def join_uneven_inputs(
    steps: Steps, joinables: Sequence[Any], loaders: Sequence[Any], even_batches: bool | None = None
) -> Iterator[None]:
    """See :meth:`shardwise.Accelerator.join_uneven_inputs`.

    Args:
        steps: the Accelerator's state.
        joinables: models and optimizers of it.
        loaders: prepared ones.
        even_batches: their setting inside the block.
    """
    engines = _engines(steps, joinables)
    changed = [(loader, loader.even_batches) for loader in loaders if even_batches is not None and _may_change(loader)]
    for loader, _ in changed:
        loader.even_batches = even_batches
    if even_batches is not None and len(changed) < len(loaders):
        warnings.warn(
            "join_uneven_inputs: even_batches is only supported for map-style datasets; the loaders of iterable ones "
            "keep their setting",
            stacklevel=3,
        )
    try:
        with uneven_inputs(engines, [o.optimizer for o in steps.optimizers], _Followed(steps)):
            yield
    finally:
        for loader, before in changed:
            loader.even_batches = before


def _engines(steps: Steps, joinables: Sequence[Any]) -> list[Engine]:
    engines = steps.engines()
    for item in joinables:
        if isinstance(item, nn.Module):
            engine = engine_of(item)
            if engine is not None and engine not in engines:
                engines.append(engine)
            known = engine is not None or any(item is model for model in steps.models)
        else:
            known = isinstance(item, Optimizer) and any(item in (o, o.optimizer) for o in steps.optimizers)
        if not known:
            raise UnitError(
                f"join_uneven_inputs got a {type(item).__name__} that was not prepared",
                fix="list models and optimizers that accelerator.prepare returned",
            )
    return engines


def _may_change(loader: Any) -> bool:
    return hasattr(loader, "even_batches") and not isinstance(loader.dataset, torch.utils.data.IterableDataset)


class _Followed:
    """Accumulation windows, loss scales and schedules, for ranks that follow."""

    parts = False

    def __init__(self, steps: Steps) -> None:
        self.steps = steps

    @property
    def depth(self) -> int:
        return len(self.steps.loaders)

    @property
    def at_end(self) -> bool:
        loader = self.steps.loader
        return loader is not None and loader.end_of_dataloader

    def shared(self) -> Any:
        steps = self.steps
        counts = {name: getattr(steps, name) for name in _COUNTS}
        return counts, [(o.checked, o.stepped, o._skipped) for o in steps.optimizers]

    def take(self, state: Any) -> None:
        counts, flags = state
        for name, value in counts.items():
            setattr(self.steps, name, value)
        for optimizer, (checked, stepped, skipped) in zip(self.steps.optimizers, flags, strict=True):
            optimizer.checked, optimizer.stepped, optimizer._skipped = checked, stepped, skipped

    def rules(self) -> dict[str, Callable[..., None]]:
        return {
            "micro_batch": lambda join, *counts: self.steps.count(*counts),
            "weigh": lambda join: join.total(self.steps._weight),
            "unscale": self._unscale,
            "renew": lambda join, scale: self.steps.renew(scale),
            "schedule": self._schedule,
        }

    def _unscale(self, join: Join, index: int) -> None:
        optimizer: AcceleratedOptimizer = self.steps.optimizers[index]
        scaler = self.steps.scaler
        assert scaler is not None
        scaler.scale(torch.zeros((), device=join.world.device))  # a scaler makes its state at the first loss
        optimizer.take_scale_out()

    def _schedule(self, join: Join, index: int, args: Any, kwargs: Any) -> None:
        self.steps.schedulers[index].scheduler.step(*args, **kwargs)


_COUNTS = ("micro", "sync_gradients", "_fresh", "_block_fresh", "_weighted", "_unit", "_unit_known", "_batches")
