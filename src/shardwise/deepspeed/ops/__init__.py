"""Optimizers under DeepSpeed's names, on ``torch.optim`` wherever torch has one. Nothing is compiled."""

from __future__ import annotations

from shardwise.lazy import importing

_MODULES = ("adagrad", "adam", "lamb", "lion", "muon")
_HOMES = {"build_optimizer": "building"}

__getattr__ = importing(__name__, _HOMES, _MODULES)
__all__ = ["adagrad", "adam", "build_optimizer", "lamb", "lion", "muon"]
