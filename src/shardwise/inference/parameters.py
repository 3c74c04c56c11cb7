"""Parameters made anew on another device, as what they were: class, attributes, whether they get gradients."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn


def like(old: nn.Parameter, values: torch.Tensor) -> nn.Parameter:
    """A parameter with other values, of the class of ``old`` and with the attributes that were set on it.

    A class whose constructor takes some of them as arguments gets them there, as quantised parameters want it.
    """
    kind = type(old)
    if isinstance(values, kind) and not issubclass(kind, nn.Parameter):
        new = nn.Parameter(values, requires_grad=old.requires_grad)  # a tensor subclass, which torch marks as parameter
    elif kind is nn.Parameter or not issubclass(kind, nn.Parameter):
        new = nn.Parameter(values, requires_grad=old.requires_grad)
    else:
        new = kind(values, requires_grad=old.requires_grad, **_taken(kind, vars(old)))
    for name, value in vars(old).items():
        if name not in vars(new):
            setattr(new, name, value)
    return new


def on_device(p: nn.Parameter, device: torch.device, non_blocking: bool = False) -> nn.Parameter:
    """The parameter on another device; itself if it is there. Subclasses that move in a way of their own do.

    A lazy one, without a shape yet, is made there anew.
    """
    if p.device == device:
        return p
    if isinstance(p, nn.UninitializedParameter):
        kind: Any = type(p)
        new: nn.Parameter = kind(requires_grad=p.requires_grad, device=device, dtype=p.dtype)
        return new
    with torch.no_grad():
        moved = p.to(device, non_blocking=non_blocking)
    return moved if isinstance(moved, type(p)) and isinstance(moved, nn.Parameter) else like(p, moved.detach())


def _taken(kind: type[nn.Parameter], attributes: dict[str, Any]) -> dict[str, Any]:
    """Those attributes that the constructor has arguments for."""
    names: set[str] = set()
    for maker in (kind.__new__, kind.__init__):
        try:
            parameters = inspect.signature(maker).parameters.values()
        except (TypeError, ValueError):  # written in C
            continue
        if maker is not nn.Parameter.__new__ and any(p.kind is p.VAR_KEYWORD for p in parameters):
            if maker is kind.__new__:
                return dict(attributes)
            continue
        names |= {p.name for p in parameters}
    return {name: value for name, value in attributes.items() if name in names - {"data", "requires_grad"}}
