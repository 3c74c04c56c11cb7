"""Uneven inputs in a loop that nobody counts: a rank has data as long as it calls the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from shardwise.comm import World
from shardwise.engine.engine import Engine
from shardwise.engine.join import Join, Loop


@contextmanager
def uneven_inputs(
    engines: Sequence[Engine], optimizers: Sequence[Optimizer] | None = None, loop: Loop | None = None
) -> Iterator[None]:
    """Inside, ranks may run out of data at different times; see :mod:`shardwise.engine.join`.

    Args:
        engines: the models', in an order that all ranks share.
        optimizers: those that may step inside, in such an order; default: those that are attached to the models.
        loop: who counts micro-batches; default: nobody does, and a rank has data as long as it calls a model.
    """
    world = World.current()
    if world.size == 1 or world.fake:
        yield
    elif world.join is not None:
        world.join.include(engines)
        yield
    else:
        if optimizers is None:
            optimizers = list({id(o): o for engine in engines for o in engine.optimizers}.values())
        with Join(world, engines, optimizers, _Uncounted() if loop is None else loop):
            yield


class _Uncounted:
    """A loop without dataloaders, windows and scales of ours."""

    steps: Any = None
    parts = True
    depth = 0
    at_end = False

    def shared(self) -> Any:
        return None

    def take(self, state: Any) -> None:
        """There is nothing to take."""

    def rules(self) -> dict[str, Callable[..., None]]:
        return {}
