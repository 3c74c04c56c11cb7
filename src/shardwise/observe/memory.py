"""Exact live tensor bytes during some code, by state: also on CPU, also under fake tensors.

Follows every storage that an operation creates, through a ``TorchDispatchMode`` and weak references (the
technique of ``torch.distributed._tools.mem_tracker``), and takes the model states from the engine's ledger.
A metered step is slow: meter one step, not a run.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from shardwise.engine.build import require_engine
from shardwise.tiers import STATES


class MemoryMeter(TorchDispatchMode):
    """``with memory_meter(model) as m: step()``, then read ``m.peak`` and ``m.peak_total``.

    Attributes:
        peak: bytes by state at the moment of the joint peak; ``activations`` is every live tensor created
            inside the block that is no model state: saved activations, temporaries, inputs made there.
        peak_total: their sum.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.ledger = require_engine(module).ledger
        self.paused = False
        self._sizes: dict[int, int] = {}
        self._watch: dict[int, weakref.ref[Any]] = {}
        self.activations = 0
        self.peak_total = 0
        self.peak: dict[str, int] = dict.fromkeys((*STATES, "activations"), 0)

    def __enter__(self) -> MemoryMeter:
        self.ledger.observer = self
        self.sample()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self.ledger.observer = None
        self._watch.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if _plain(t)}
        out = func(*args, **(kwargs or {}))
        if not self.paused and func._schema.name != "aten::set_":  # which takes memory that is there
            for t in tree_iter(out):
                if _plain(t) and t.untyped_storage()._cdata not in before:
                    self._follow(t)
        return out

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._watch[key] = weakref.ref(storage, partial(self._gone, key))
        self.activations += self._sizes[key]
        self.sample()

    def _gone(self, key: int, _ref: object) -> None:
        self._forget(key)

    def _forget(self, key: int) -> None:
        self.activations -= self._sizes.pop(key, 0)
        self._watch.pop(key, None)

    def disown(self, tensor: torch.Tensor) -> None:
        """The ledger counts this one."""
        self._forget(tensor.untyped_storage()._cdata)

    def sample(self) -> None:
        total = self.ledger.total + self.activations
        if total > self.peak_total:
            self.peak_total = total
            self.peak = {**self.ledger.live, "activations": self.activations}


def memory_meter(module: nn.Module) -> MemoryMeter:
    """Measure exact live bytes of a sharded module inside a ``with`` block. See :class:`MemoryMeter`."""
    return MemoryMeter(module)


def _plain(item: Any) -> bool:
    return isinstance(item, torch.Tensor) and item.layout == torch.strided and not hasattr(item, "bucket")
