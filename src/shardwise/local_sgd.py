"""``LocalSGD``: every rank trains a copy of its own, and the copies are averaged from time to time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from shardwise.engine.engine import Engine
from shardwise.engine.hooks import engine_of
from shardwise.errors import NotServed, StrategyError, UnitError

if TYPE_CHECKING:
    from shardwise.accelerator import Accelerator


class LocalSGD:
    """Average the parameters every few steps instead of the gradients in every step. A context manager.

    ::

        with LocalSGD(accelerator=accelerator, model=model, local_sgd_steps=8) as local_sgd:
            for batch in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(loss_of(model, batch))
                    optimizer.step()
                    optimizer.zero_grad()
                    local_sgd.step()

    Between two averages the ranks' weights differ; optimizer states stay each rank's own. Buffers are not averaged.

    Args:
        accelerator: the one that prepared the model.
        model: a prepared model under ``ddp``: only there does each rank hold a whole copy to train.
        local_sgd_steps: calls of :meth:`step` between two averages.
        enabled: false leaves everything as it is.

    Raises:
        StrategyError: another strategy than ``ddp``; fewer than one step.
        UnitError: the model was not prepared.

    Cost: no reduce in backward; an average sends 2 (N-1)/N of the parameters per rank, N ranks. The block's end
    averages too.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, local_sgd_steps: int, enabled: bool = True) -> None:
        self.enabled = enabled and accelerator.num_processes > 1
        self.accelerator, self.model, self.local_sgd_steps = accelerator, model, local_sgd_steps
        self.num_steps = 0
        if local_sgd_steps < 1:
            raise StrategyError(f"local_sgd_steps={local_sgd_steps} is not a number of steps", fix="give 1 or more")
        if self.enabled:
            self._engine: Engine = _whole(model)

    def __enter__(self) -> LocalSGD:
        if self.enabled:
            engine = self._engine
            self._before = engine.sync
            engine.sync, engine.local = False, True
            _share(engine, 1.0)
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if self.enabled:
            engine = self._engine
            engine.sync, engine.local = self._before, False
            _share(engine, 1.0 / engine.world.size)
            if kind is None:  # after an error the other ranks may not come
                self._average()

    def step(self) -> None:
        """Count one; every ``local_sgd_steps`` of them average the parameters. A collective then.

        Accelerate counts calls, wherever they are made; so does this.
        """
        self.num_steps += 1
        if self.enabled and self.num_steps % self.local_sgd_steps == 0:
            self._average()

    def _average(self) -> None:
        for unit in self._engine.units:
            for bucket in unit.buckets:
                if bucket.master_dtype.is_floating_point:
                    bucket.average()


def _whole(model: nn.Module) -> Engine:
    engine = engine_of(model)
    if engine is None:
        raise UnitError(
            f"LocalSGD got a {type(model).__name__} that was not prepared", fix="model = accelerator.prepare(model)"
        )
    if any(u.strategy.preset != "ddp" for u in engine.units):
        raise NotServed(
            "LocalSGD trains one whole copy of the model per rank, and this model's states are split",
            where=f"strategy '{engine.strategy}'",
            fix="use strategy='ddp'",
        )
    return engine


def _share(engine: Engine, share: float) -> None:
    """What a gradient is multiplied by when it arrives: the ranks' mean, or this rank's own."""
    for unit in engine.units:
        for bucket in unit.buckets:
            bucket.share = share
