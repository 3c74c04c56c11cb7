"""Optimizers under DeepSpeed's names, on ``torch.optim`` wherever torch has one. Nothing is compiled."""

from __future__ import annotations

from typing import Any

from shardwise.lazy import importing

_MODULES = ("adagrad", "adam", "aio", "lamb", "lion", "muon", "op_builder")
_HOMES = {"build_optimizer": "building"}

_named = importing(__name__, _HOMES, _MODULES)
__all__ = ["adagrad", "adam", "aio", "build_optimizer", "lamb", "lion", "muon", "op_builder"]


def __getattr__(name: str) -> Any:
    if name == "__compatible_ops__":  # by the names of DeepSpeed's extensions: does what they are for work?
        return _named("op_builder").COMPATIBLE
    return _named(name)
