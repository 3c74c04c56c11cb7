"""Who imports the names that are stood in for, and which versions of them this one serves."""

from __future__ import annotations

import importlib.metadata
import sys
from importlib import import_module

from shardwise.errors import MissingPackage

# The oldest that is served: a module's name to its distribution's, and its version.
OLDEST = {
    "transformers": ("transformers", "5.0"),
    "trl": ("trl", "1.0"),
    "peft": ("peft", "0.18"),
    "diffusers": ("diffusers", "0.36"),
    "sentence_transformers": ("sentence-transformers", "5.2"),
}
_known: set[str] = set()


def check_users() -> None:
    """Look at those that have been imported since the last call. transformers' Trainers will be ours, see
    :func:`adopt_trainers`.

    Raises:
        MissingPackage: one is too old.
    """
    for module, (distribution, oldest) in OLDEST.items():
        if module not in sys.modules or module in _known:
            continue
        _known.add(module)
        if module == "transformers":
            import_module("shardwise.state").preparations.append(adopt_trainers)
        try:
            found = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue  # somebody's own copy
        if _release(found) < _release(oldest):
            raise MissingPackage(
                f"{distribution} {found} is too old for Shardwise in Accelerate's place",
                fix=f"pip install '{distribution}>={oldest}'",
            )


def adopt_trainers() -> None:
    """Called when a script asks who its process is, as the arguments of every Trainer do: by then transformers' module
    is complete, which imports our names in its own first lines."""
    module = sys.modules.get("transformers.trainer")
    if module is not None and hasattr(module, "Trainer"):
        import_module("shardwise.transformers.adopting").adopt(module)


def _release(version: str) -> tuple[int, ...]:
    """The numbers at the front of a version: ``5.1.0.dev0`` is ``(5, 1, 0)``."""
    numbers: list[int] = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
