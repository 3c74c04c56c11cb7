"""Ranks that share one model and write texts of different lengths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from shardwise.engine.hooks import engine_of
from shardwise.engine.uneven import uneven_inputs
from shardwise.errors import UnitError


@contextmanager
def together(*models: nn.Module) -> Iterator[None]:
    """Let every rank run models that all ranks split as often as it likes. Collective: every rank enters.

    A rank that leaves the block lends its part of the weights to the others until the last one has left, so nobody
    waits for a forward that does not come, and nothing is padded to the longest text::

        with shardwise.together(model):
            for prompt in mine:  # as many as this rank has
                model.generate(prompt, max_new_tokens=...)

    Args:
        models: of :func:`shardwise.load` or :func:`shardwise.fully_shard`, in an order that all ranks share.

    Raises:
        UnitError: one of them is not sharded.
        CommError: something inside needs all ranks, and is not one of these models.

    Cost: an exchange of 16 bytes per rank and forward; see :mod:`shardwise.engine.join`.
    """
    engines = [engine_of(model) for model in models]
    for model, engine in zip(models, engines, strict=True):
        if engine is None:
            raise UnitError(f"{type(model).__name__} is not sharded", fix="give what shardwise.load returned")
    with uneven_inputs([engine for engine in engines if engine is not None]):
        yield
