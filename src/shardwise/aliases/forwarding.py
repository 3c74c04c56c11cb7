"""Modules under another name: the same objects, so that a class has one identity and what is patched is patched."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any

# Of a name, and of all that begins with it and a dot.
HOMES = {
    "deepspeed": "shardwise.deepspeed",
    "accelerate.accelerator": "shardwise.accelerator",
    "accelerate.big_modeling": "shardwise.big_modeling",
    "accelerate.commands.config": "shardwise.cli.accelerate_commands",
    "accelerate.commands.launch": "shardwise.cli.accelerate_commands",
    "accelerate.data_loader": "shardwise.data_loader",
    "accelerate.hooks": "shardwise.hooks",
    "accelerate.launchers": "shardwise.launchers",
    "accelerate.local_sgd": "shardwise.local_sgd",
    "accelerate.logging": "shardwise.logging",
    "accelerate.memory_utils": "shardwise.utils.memory",
    "accelerate.optimizer": "shardwise.optimizer",
    "accelerate.parallelism_config": "shardwise.utils.parallelism",
    "accelerate.scheduler": "shardwise.scheduler",
    "accelerate.state": "shardwise.state",
    "accelerate.tracking": "shardwise.tracking",
    "accelerate.utils": "shardwise.utils",
}
# Modules of Accelerate's that have no counterpart: their names are those of shardwise.utils, or refused one by one.
_ELSEWHERE = {
    f"accelerate.utils.{name}" for name in ("ao", "bnb", "launch", "megatron_lm", "torch_xla", "transformer_engine")
}


class _Forwarded(Loader):
    """Puts the module that there is where the import system expects a new one."""

    def __init__(self, home: str) -> None:
        self._home = home

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(self._home)


class _OfUtils(Loader):
    """A module whose names are looked up in ``shardwise.utils``, which says why it has not got one."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        def __getattr__(name: str) -> Any:
            return named("shardwise.utils", name, sys._getframe(1))

        module.__getattr__ = __getattr__  # type: ignore[method-assign]


def named(module: str, name: str, asking: FrameType) -> Any:
    """A name of a module, for the ``__getattr__`` of another one.

    Args:
        asking: the frame that called it: in ``from ... import`` it is one of the import system, which takes an
            AttributeError for an answer and raises an error of its own.

    Raises:
        LeftOut: a name that is left out on purpose.
    """
    utils = import_module("shardwise.utils")
    if module == "shardwise.utils" and name in utils.LEFT_OUT:
        raise utils.refusal(name, importing=asking.f_code.co_name == "_handle_fromlist")
    return getattr(import_module(module), name)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        home = home_of(fullname)
        if home is not None and _exists(home):
            return ModuleSpec(fullname, _Forwarded(home))
        if fullname in _ELSEWHERE:
            return ModuleSpec(fullname, _OfUtils())
        return None


def home_of(name: str) -> str | None:
    """The module that a name stands for; ``None`` for one that is nobody's, or the stand-in's own."""
    for prefix, home in HOMES.items():
        if name == prefix or name.startswith(f"{prefix}."):
            return home + name.removeprefix(prefix)
    return None


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a module of something that is no package
        return False


def forward() -> None:
    """From now on, modules of the names that are stood in for are found here. They are imported when they are used."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
