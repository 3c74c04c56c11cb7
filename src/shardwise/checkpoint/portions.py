"""What a load fills at a time: all that is in memory, and each bucket that lives on a disk by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from shardwise.engine.bucket import Bucket
from shardwise.engine.state_dict import Held


@dataclass
class Portion:
    """Tensors that are in memory at the same time.

    Args:
        bucket: whose they are, if it has values or optimizer state on a disk; ``None``: all others.
        tensors: by their names in the checkpoint.
        after: what to call when they have their values.
    """

    bucket: Bucket | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    after: list[Callable[[], object]] = field(default_factory=list)

    def here(self) -> AbstractContextManager[object]:
        """Have its values in memory inside the block. They go home after it."""
        return nullcontext() if self.bucket is None else self.bucket.master_here(write=True)


class Portions:
    """All that a load fills.

    Attributes:
        rest: for what has no portion of its own, and for what belongs to no parameter; comes last.
    """

    def __init__(self) -> None:
        self._of: dict[int, Portion] = {}
        self.rest = Portion()

    def of(self, mine: Held | None) -> Portion:
        """Where what belongs to a parameter is to be put."""
        if mine is None or mine.bucket.home is None or mine.bucket.home.disk is None:
            return self.rest
        return self._of.setdefault(id(mine.bucket), Portion(mine.bucket))

    def __iter__(self) -> Iterator[Portion]:
        yield from self._of.values()
        yield self.rest

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor for portion in self for name, tensor in portion.tensors.items()}
