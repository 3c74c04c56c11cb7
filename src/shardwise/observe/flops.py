"""Floating-point operations of some code, counted as it runs."""

from __future__ import annotations

import sys
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class FlopCount(TorchDispatchMode):
    """Counts by the formulas of ``torch.utils.flop_counter``, in a backward too: a multiply-add is two.

    ``FlopCounterMode`` itself also follows modules, by hooks on all of them, which a run that goes on must not notice.

    Attributes:
        total: so far. Matrix products, convolutions and attention; nothing else counts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **kwargs, out_val=out))
        return out


def something_is_compiled() -> bool:
    """Has this process compiled code? A count would make it run uncompiled for that step, with other roundings."""
    compiler = sys.modules.get("torch._dynamo.utils")  # not imported for this
    return bool(getattr(compiler, "counters", {}).get("frames"))
