"""``shardwise.utils`` and its submodules: :mod:`shardwise.compat` under the name that scripts import.

The modules are the same ones, not copies: a class has one identity, and what a script patches is patched. The
``.pyi`` files beside this one say so to type checkers.
"""

import sys
from importlib import import_module
from pkgutil import iter_modules

from shardwise import compat
from shardwise.compat import *

for _module in iter_modules(compat.__path__):
    sys.modules[f"{__name__}.{_module.name}"] = import_module(f"{compat.__name__}.{_module.name}")
sys.modules[__name__] = compat
