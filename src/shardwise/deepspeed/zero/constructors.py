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

    Every class of modules gets an ``__init__`` that tells, those that are defined inside too; they are what they were
    when the context ends. A module whose class slips through is told about when it is put into another one, or when
    the context ends. Modules that other threads make meanwhile are not concerned.

    Args:
        ended: is called with each.
        missed: has a module new parameters? Asked of one that is put into another one, and of what is in it: some
            functions, such as ``skip_init``, replace parameters behind the back of a module.
    """

    def __init__(
        self, ended: Callable[[nn.Module], None], missed: Callable[[nn.Module], bool] = lambda module: False
    ) -> None:
        self._ended, self._missed = ended, missed
        self._stack = ExitStack()
        self._own: dict[Any, Any] = {}  # the __init__ that a class had itself, if it had one
        self._waiting: dict[int, nn.Module] = {}
        self._running: set[int] = set()  # modules (by id) whose constructor runs
        self._thread = 0

    def __enter__(self) -> Constructors:
        self._thread = threading.get_ident()
        registered: Any = self._registered
        added: Any = self._added  # torch types them as if they returned nothing
        self._stack.callback(self._unwrap)
        for kind in _kinds(nn.Module):
            self._wrap(kind)
        self._hear_of_classes()
        self._stack.callback(register_module_parameter_registration_hook(registered).remove)
        self._stack.callback(register_module_module_registration_hook(added).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if error[0] is None:
            self.flush()
        self._waiting.clear()

    def flush(self) -> None:
        """Tell of modules whose constructors ended unnoticed."""
        for module in list(self._waiting.values()):
            if id(module) not in self._running:
                self._tell(module)

    def _registered(self, module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if threading.get_ident() == self._thread and param is not None:
            self._waiting[id(module)] = module

    def _added(self, module: nn.Module, name: str, child: nn.Module | None) -> None:
        if threading.get_ident() == self._thread and child is not None:
            self._tell(child)
            for module in child.modules():
                if id(module) not in self._running and self._missed(module):
                    self._ended(module)

    def _tell(self, module: nn.Module) -> None:
        if self._waiting.pop(id(module), None) is not None:
            self._ended(module)

    def _hear_of_classes(self) -> None:
        """Classes of modules that are defined inside are wrapped, too."""
        base: Any = nn.Module
        before = vars(base).get("__init_subclass__")

        def defined(kind: type[nn.Module], **kwargs: Any) -> None:
            super(nn.Module, kind).__init_subclass__(**kwargs)
            self._wrap(kind)

        base.__init_subclass__ = classmethod(defined)
        if before is None:
            self._stack.callback(delattr, base, "__init_subclass__")
        else:
            self._stack.callback(setattr, base, "__init_subclass__", before)

    def _wrap(self, kind: Any) -> None:
        init = vars(kind).get("__init__")
        if init is None or kind in self._own:
            return
        self._own[kind] = init

        @functools.wraps(init)
        def told(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            if threading.get_ident() != self._thread or id(module) in self._running:  # by a subclass's
                init(module, *args, **kwargs)
                return
            self._running.add(id(module))
            try:
                init(module, *args, **kwargs)
            finally:
                self._running.discard(id(module))
            self._tell(module)

        kind.__init__ = told

    def _unwrap(self) -> None:
        for kind, own in self._own.items():
            kind.__init__ = own
        self._own.clear()


def _kinds(base: type[nn.Module]) -> set[type[nn.Module]]:
    """All classes below a class."""
    found: set[type[nn.Module]] = set()
    new = base.__subclasses__()
    while new:
        kind = new.pop()
        if kind not in found:
            found.add(kind)
            new += kind.__subclasses__()
    return found
