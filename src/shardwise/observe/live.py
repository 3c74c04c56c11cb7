"""Every live byte during some code, on the device and on its host: also on a CPU, also of tensors without values.

Follows every storage that an operation creates, through a ``TorchDispatchMode`` and weak references (the technique of
``torch.distributed._tools.mem_tracker``), and takes the model states from the engine's ledger.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from shardwise.tiers import STATES, Ledger

ACTIVATIONS = "activations"
"""Every live tensor that is no model state: what autograd saved, temporaries, inputs, logits."""


@dataclass(frozen=True)
class Live:
    """Bytes by state, :data:`ACTIVATIONS` included, of the device and of its host."""

    device: dict[str, int]
    host: dict[str, int]

    @property
    def on_device(self) -> int:
        return sum(self.device.values())

    @property
    def on_host(self) -> int:
        return sum(self.host.values())


class LiveBytes(TorchDispatchMode):
    """Knows what is live inside of a ``with`` block, and calls :meth:`sample` when there is more.

    Args:
        ledger: counts the model states.
        device: of the model. What is on the CPU is the host's, unless the device is one.
    """

    def __init__(self, ledger: Ledger, device: torch.device) -> None:
        super().__init__()
        self.ledger, self.device = ledger, device
        self.paused = False
        self._one_memory = device.type == "cpu"
        self._watch: dict[int, tuple[weakref.ref[Any], int, bool]] = {}
        self._other = [0, 0]  # bytes of no model state: of the device, of the host

    def __enter__(self) -> Any:
        self.ledger.observer = self
        self.sample()
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self.ledger.observer = None
        self._watch.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.paused:
            self.saw(func, args, kwargs, out)
        return out

    def saw(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """An operation has taken place."""
        if func._schema.name == "aten::set_":  # which takes memory that is there
            return
        before = {t.untyped_storage()._cdata for t in tree_iter((args, kwargs)) if has_memory(t)}
        for t in tree_iter(out):
            if has_memory(t) and t.untyped_storage()._cdata not in before:
                self._follow(t)

    def on_host(self, tensor: torch.Tensor) -> bool:
        """Is it in another memory than the device's?"""
        return tensor.is_cpu and not self._one_memory

    def _follow(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._watch:
            return
        size, host = storage.nbytes(), self.on_host(tensor)
        self._watch[key] = weakref.ref(storage, partial(self._gone, key)), size, host
        self._other[host] += size
        self.sample()

    def _gone(self, key: int, _ref: object = None) -> None:
        _, size, host = self._watch.pop(key, (None, 0, False))
        self._other[host] -= size

    def disown(self, tensor: torch.Tensor) -> None:
        """The ledger counts this one."""
        self._gone(tensor.untyped_storage()._cdata)

    @property
    def totals(self) -> tuple[int, int]:
        """Live bytes of the device and of the host."""
        host = 0 if self._one_memory else sum(self.ledger.on_host.values())
        return self.ledger.total - host + self._other[0], host + self._other[1]

    def now(self) -> Live:
        """What is live."""
        ledger = self.ledger
        host = dict.fromkeys(STATES, 0) if self._one_memory else dict(ledger.on_host)
        device = {state: ledger.live[state] - host[state] for state in STATES}
        return Live({**device, ACTIVATIONS: self._other[0]}, {**host, ACTIVATIONS: self._other[1]})

    def sample(self) -> None:
        """More is live than before, perhaps."""


def has_memory(item: Any) -> bool:
    """Is it a tensor with a storage of its own, and not a handle?"""
    return isinstance(item, torch.Tensor) and item.layout == torch.strided and not hasattr(item, "bucket")
