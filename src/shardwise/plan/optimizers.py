"""Optimizers that a plan knows by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shardwise.errors import PlanError, did_you_mean

Make = Callable[[Sequence[nn.Parameter]], list[Optimizer]]


def _one(kind: Any, **settings: object) -> Make:
    return lambda params: [kind(list(params), lr=1e-4, **settings)]


def _muon(params: Sequence[nn.Parameter]) -> list[Optimizer]:
    """Matrices get Muon, the rest AdamW, as its authors say."""
    matrices = [p for p in params if p.ndim == 2]
    rest = [p for p in params if p.ndim != 2]
    made: list[Optimizer] = [torch.optim.Muon(matrices, lr=1e-3)] if matrices else []
    return [*made, torch.optim.AdamW(rest, lr=1e-4)] if rest else made


OPTIMIZERS: dict[str, tuple[Make, int]] = {
    "adamw": (_one(torch.optim.AdamW), 2),
    "adam": (_one(torch.optim.Adam), 2),
    "sgd": (_one(torch.optim.SGD), 0),
    "momentum": (_one(torch.optim.SGD, momentum=0.9), 1),
    "rmsprop": (_one(torch.optim.RMSprop), 1),
    "adagrad": (_one(torch.optim.Adagrad), 1),
    "muon": (_muon, 1),
    "adafactor": (_one(torch.optim.Adafactor), 0),
}
"""By name: what makes it, and state tensors per parameter that are as large as the parameter."""

WHOLE_MATRICES = ("muon", "adafactor")
"""Those that need whole parameters: under ``layout=tensor``."""


def optimizer(name: str) -> Make:
    """What makes an optimizer of that name.

    Raises:
        PlanError: there is none.
    """
    if name not in OPTIMIZERS:
        raise PlanError(
            f"no optimizer '{name}' is known", fix=did_you_mean(name, OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        )
    return OPTIMIZERS[name][0]
