"""``zero.GatheredParameters``: whole values of some parameters for a while, wherever they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from shardwise.deepspeed.zero.external import register_external_parameter
from shardwise.engine.gathered import gathered
from shardwise.engine.parked import parked_in
from shardwise.engine.unit import unit_of
from shardwise.errors import ArgumentError
from shardwise.operations import rank_and_size


class GatheredParameters:
    """A block in which some parameters have their whole values, on every rank.

    Args:
        params: one parameter, or several in any iterable. Those that are not split are left alone.
        modifier_rank: the rank whose values count when the block ends; ``None``: they are read only, and a write is an
            error. Values that stay on every rank (``ddp``, ``zero1``, ``zero2``) may be written to all the same.
        fwd_module: a module whose ``forward`` uses them; see :func:`register_external_parameter`.
        enabled: ``False``: the block does nothing.

    Raises:
        ArgumentError: something else than parameters, or a rank that there is not.
        UnitError: values were written to without a ``modifier_rank``.

    A collective: every rank enters. Blocks may be nested, also around the same parameters. With the parameters come
    the rest of their units, to be read; a loop with a block for each parameter gathers each unit once.
    """

    def __init__(
        self, params: Any, modifier_rank: int | None = None, fwd_module: nn.Module | None = None, enabled: bool = True
    ) -> None:
        self.enabled, self.src_rank = enabled, modifier_rank
        self.params: list[nn.Parameter] = []
        self._open: list[ExitStack] = []
        if not enabled:
            return
        ranks = rank_and_size()[1]
        if modifier_rank is not None and modifier_rank not in range(ranks):
            raise ArgumentError(f"modifier_rank={modifier_rank!r} of {ranks} ranks", fix="they are counted from 0")
        given = [params] if isinstance(params, torch.Tensor) else params
        if not isinstance(given, Iterable):
            raise ArgumentError(
                f"GatheredParameters got a {type(params).__name__}", fix="give a parameter, or several in a list"
            )
        for p in given:
            if not isinstance(p, torch.Tensor):
                raise ArgumentError(
                    f"GatheredParameters got a {type(p).__name__} among the parameters", fix="give parameters only"
                )
            if isinstance(p, nn.Parameter) and not any(p is other for other in self.params):
                self.params.append(p)
        if fwd_module is not None:
            for p in self.params:
                register_external_parameter(fwd_module, p)

    def __enter__(self) -> None:
        if not self.enabled:
            return
        stack = ExitStack()
        with stack:
            sharded = [p for p in self.params if unit_of(p) is not None]
            if sharded:
                write = self.src_rank is not None
                stack.enter_context(gathered(sharded, write=write, source=self.src_rank or 0, one_by_one=True))
            for lot in {id(lot): lot for p in self.params if (lot := parked_in(p)) is not None}.values():
                stack.enter_context(lot.here([p for p in self.params if parked_in(p) is lot], self.src_rank))
            self._open.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        if self.enabled:
            self._open.pop().__exit__(*error)


@contextmanager
def unwrap_model_for_generation(model: Any) -> Iterator[Any]:
    """A block in which a model, or an engine, has all its values on every rank, so that ``generate`` gathers none."""
    with GatheredParameters(model.parameters()):
        yield model
