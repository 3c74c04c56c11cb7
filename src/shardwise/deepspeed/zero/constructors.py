"""Hearing that a module's constructor has ended."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)


class Constructors:
    """A context that tells of each module with parameters of its own that is made in it, when its constructor ends.

    The first module of a class is told about when it is put into another one, or when the context ends: that its class
    exists is known when it registers its first parameter. Classes that are defined inside are like any others. Modules
    that other threads make meanwhile are not concerned.

    Args:
        ended: is called with each.
    """

    def __init__(self, ended: Callable[[nn.Module], None]) -> None:
        self._ended = ended
        self._stack = ExitStack()
        self._own: dict[type[nn.Module], Any] = {}  # the __init__ that a class had itself, if it had one
        self._waiting: dict[int, nn.Module] = {}
        self._thread = 0

    def __enter__(self) -> Constructors:
        self._thread = threading.get_ident()
        registered: Any = self._registered
        added: Any = self._added  # torch types them as if they returned nothing
        self._stack.callback(self._unwrap)
        self._stack.callback(register_module_parameter_registration_hook(registered).remove)
        self._stack.callback(register_module_module_registration_hook(added).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        waiting, self._waiting = list(self._waiting.values()), {}
        if error[0] is None:
            for module in waiting:
                self._ended(module)

    def _registered(self, module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if threading.get_ident() == self._thread and param is not None:
            self._waiting[id(module)] = module
            self._wrap(type(module))

    def _added(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        if threading.get_ident() == self._thread and child is not None:
            self._tell(child)

    def _tell(self, module: nn.Module) -> None:
        if self._waiting.pop(id(module), None) is not None:
            self._ended(module)

    def _wrap(self, kind: type[nn.Module]) -> None:
        if kind in self._own:
            return
        init: Any = kind.__init__
        self._own[kind] = vars(kind).get("__init__")

        @functools.wraps(init)
        def told(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            init(module, *args, **kwargs)
            if type(module) is kind and threading.get_ident() == self._thread:  # and not a subclass's super().__init__
                self._tell(module)

        self._set(kind, told)

    @staticmethod
    def _set(kind: Any, init: Any) -> None:
        kind.__init__ = init

    def _unwrap(self) -> None:
        for kind, own in self._own.items():
            if own is None:
                del kind.__init__
            else:
                self._set(kind, own)
        self._own.clear()
