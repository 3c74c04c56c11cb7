"""A bucket: a unit's parameters of one dtype, their values (``flat.py``) and their gradients (``gradients.py``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwise.engine.flat import FlatParameters
from shardwise.engine.gradients import Gradients
from shardwise.engine.own_gradients import OwnGradients
from shardwise.engine.sharded_grad import ShardedGrad

if TYPE_CHECKING:
    from typing_extensions import Self


class Bucket(FlatParameters):
    """Flat values with gradients. See :class:`~shardwise.engine.flat.FlatParameters` for the arguments.

    Attributes:
        grads: the gradients of its parameters.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.grads = self._gradients()

    def _gradients(self) -> Gradients:
        return OwnGradients(self, ShardedGrad) if self.placement.settled else Gradients(self, ShardedGrad)

    def copied(self, *args: Any, **kwargs: Any) -> Self:
        new = super().copied(*args, **kwargs)
        new.grads = new._gradients()
        return new
