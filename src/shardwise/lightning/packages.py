"""Which of Lightning's packages is meant, and whether it is one that this door knows.

Lightning comes as ``lightning`` and as ``pytorch_lightning`` with ``lightning_fabric``: the same code twice, whose
classes do not know each other. The one that a script has imported is meant; if both or neither, ``lightning``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

from shardwise.errors import ConfigError, MissingPackage

OLDEST, NEWEST = (2, 5), (2, 6)
"""Versions whose interface of strategies this door was written for, both included."""


def _package() -> str:
    both = "lightning", "pytorch_lightning"
    imported = [name for name in both if name in sys.modules]
    if imported:
        return imported[0]
    found = next((name for name in both if importlib.util.find_spec(name) is not None), None)
    if found is None:
        raise MissingPackage("Lightning is not installed", fix="pip install 'lightning>=2.5,<2.7'")
    return found


def _check(package: Any) -> None:
    version = str(package.__version__)
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if not OLDEST <= numbers <= NEWEST:
        low, high = (".".join(map(str, v)) for v in (OLDEST, NEWEST))
        raise ConfigError(
            f"{package.__name__} {version} is not served: versions {low} to {high} are",
            where="shardwise.lightning",
            fix=f"pip install '{package.__name__}>={low},<{NEWEST[0]}.{NEWEST[1] + 1}'",
        )


NAME = _package()
_check(importlib.import_module(NAME))
PYTORCH, FABRIC = (
    ("lightning.pytorch", "lightning.fabric") if NAME == "lightning" else ("pytorch_lightning", "lightning_fabric")
)


def trainer(module: str = "") -> Any:
    """A module of the part with the Trainer."""
    return importlib.import_module(f"{PYTORCH}.{module}" if module else PYTORCH)


def fabric(module: str = "") -> Any:
    """A module of the part with Fabric."""
    return importlib.import_module(f"{FABRIC}.{module}" if module else FABRIC)
