"""A bucket: a unit's parameters of one dtype, their values (``flat.py``) and their gradients (``gradients.py``)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwise.engine.flat import FlatParameters
from shardwise.engine.gradients import Gradients
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
        self.grads = Gradients(self, ShardedGrad)

    def copied(self, *args: Any, **kwargs: Any) -> Self:
        new = super().copied(*args, **kwargs)
        new.grads = Gradients(new, ShardedGrad)
        return new
