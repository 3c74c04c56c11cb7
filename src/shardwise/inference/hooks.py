"""What runs before and after the ``forward`` of one module, with all of its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_HOOK, _OLD = "_hf_hook", "_old_forward"
"""Attributes of a module with a hook, as scripts and other libraries know them: the hook, and its own ``forward``."""
_STANDS = "_hooked_forward"
_OVERRIDES = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa")
"""Methods that dispatching hides behind ones that warn; they go with the hook."""


class ModelHook:
    """Does nothing; subclasses change what they need.

    Attributes:
        no_grad: the module's ``forward`` runs without recording gradients.
    """

    no_grad = False

    def init_hook(self, module: nn.Module) -> nn.Module:
        """When it is added to a module; returns the module."""
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before ``forward``; returns what this gets."""
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """After ``forward``; returns what the caller gets."""
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """When it is removed from a module; returns the module."""
        return module


class SequentialHook(ModelHook):
    """Several hooks as one. All of their methods run in the order given, ``post_forward`` too.

    Attributes:
        hooks: these.
    """

    def __init__(self, *hooks: ModelHook) -> None:
        self.hooks = hooks

    def init_hook(self, module: nn.Module) -> nn.Module:
        for hook in self.hooks:
            module = hook.init_hook(module)
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for hook in self.hooks:
            args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        for hook in self.hooks:
            output = hook.post_forward(module, output)
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        for hook in self.hooks:
            module = hook.detach_hook(module)
        return module


def hooks_of(module: nn.Module) -> list[ModelHook]:
    """The hooks of a module, those of a :class:`SequentialHook` one by one."""
    found: list[ModelHook] = []
    left = [getattr(module, _HOOK, None)]
    while left:
        hook = left.pop(0)
        if isinstance(hook, SequentialHook):
            left[:0] = hook.hooks
        elif hook is not None:
            found.append(hook)
    return found


class _HookedForward:
    """Stands in ``module.forward``, and has its name and signature. A copy of the module gets one of its own."""

    def __init__(self, module: nn.Module, own: Callable[..., Any], set_on_it: bool) -> None:
        self.module, self.own = module, own
        self.set_on_it = set_on_it  # the module's own was an attribute of this instance, not a method of its class
        self.removed = False  # somebody's wrapper around this may stay, and call it
        functools.update_wrapper(self, own, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.removed:
            return self.own(*args, **kwargs)
        module = self.module
        hook: Any = module._hf_hook
        own: Any = module._old_forward
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        if any(each.no_grad for each in (hook, *hooks_of(module))):
            with torch.no_grad():
                output = own(*args, **kwargs)
        else:
            output = own(*args, **kwargs)
        return hook.post_forward(module, output)


def add_hook_to_module(module: nn.Module, hook: ModelHook, append: bool = False) -> nn.Module:
    """Let a hook run around the module's ``forward``.

    Args:
        append: after the hook that it has. By default that one is removed.

    Returns:
        The same module.
    """
    if hasattr(module, _HOOK):
        if append:
            hook = SequentialHook(module._hf_hook, hook)  # type: ignore[arg-type]
        remove_hook_from_module(module)
    module = hook.init_hook(module)
    own = module.forward
    forward = _HookedForward(module, own, "forward" in module.__dict__)
    setattr(module, _HOOK, hook)
    # Past the attributes of modules: what stands in forward may be a module itself, as compiled ones are.
    module.__dict__[_OLD] = own
    module.__dict__["forward"] = module.__dict__[_STANDS] = forward
    return module


def remove_hook_from_module(module: nn.Module, recurse: bool = False) -> nn.Module:
    """Take the hook off again: ``forward`` is what it was.

    Args:
        recurse: from the submodules too.

    Returns:
        The same module.
    """
    hook: ModelHook | None = module.__dict__.pop(_HOOK, None)
    if hook is not None:
        hook.detach_hook(module)
    old = module.__dict__.pop(_OLD, None)
    stood: _HookedForward | None = module.__dict__.pop(_STANDS, None)
    if stood is not None:
        stood.removed, own = True, stood.set_on_it
        if module.__dict__.get("forward") is stood:
            del module.__dict__["forward"]
            if own:
                module.__dict__["forward"] = old
    for name in _OVERRIDES:
        module.__dict__.pop(name, None)
    if recurse:
        for child in module.children():
            remove_hook_from_module(child, recurse=True)
    return module


def remove_hook_from_submodules(module: nn.Module) -> None:
    """Take the hooks off a module and all modules in it."""
    remove_hook_from_module(module, recurse=True)
