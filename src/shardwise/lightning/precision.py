"""Clipping and steps under Lightning's precision plugins: the plugins stay, and clip as every strategy here does."""

from __future__ import annotations

from typing import Any

from shardwise.engine.clip import clip_grad_norm_, clip_grad_value_


def clip_by_norm(optimizer: Any, clip_val: float) -> None:
    """By the norm over all ranks; the same bits under every strategy."""
    clip_grad_norm_(parameters_of(optimizer), clip_val)


def clip_by_value(optimizer: Any, clip_val: float) -> None:
    """Every element on its own."""
    clip_grad_value_(parameters_of(optimizer), clip_val)


def parameters_of(optimizer: Any) -> list[Any]:
    """An optimizer's parameters."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def clip_here(plugin: Any, base: Any) -> None:
    """Have a plugin of a Trainer clip as this module does, unless its class has a way of its own.

    Args:
        base: Lightning's ``Precision``.
    """
    for name, function in (("clip_grad_by_norm", clip_by_norm), ("clip_grad_by_value", clip_by_value)):
        if getattr(type(plugin), name) is getattr(base, name):
            setattr(plugin, name, function)


def steps_in_the_usual_way(plugin: Any, kinds: tuple[Any, ...]) -> bool:
    """Would the plugin do nothing but hand the closure to ``optimizer.step``?"""
    usual = any(type(plugin).optimizer_step is kind.optimizer_step for kind in kinds)
    return usual and getattr(plugin, "scaler", None) is None
