"""Other libraries' names for this one: ``import accelerate`` in a script means Shardwise.

For each name there is a folder here with a package of that name and its metadata. In front of ``sys.path`` it is what
this process imports, and in front of ``PYTHONPATH`` what its children do: data workers, subprocesses, ranks that are
started anew. Nobody else is concerned, whether the real package is installed or not.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from shardwise.environment import stands_in_for
from shardwise.errors import ConfigError, did_you_mean

VERSIONS = {"accelerate": "1.15.0", "deepspeed": "0.19.8"}  # of the libraries whose names these are: others compare it
_HERE = Path(__file__).parent
# They look for the names when they are imported, and keep what they found.
_LOOKING = ("transformers", "trl", "peft", "diffusers", "sentence_transformers")


def install_as(*names: str) -> None:
    """Let ``import accelerate`` (or ``deepspeed``) mean Shardwise, in this process and those that it starts.

    ``sys.path`` and the variable ``PYTHONPATH`` get a folder in front. ``shardwise launch --as accelerate script.py``
    does the same for every rank, without a change of the script. Says so on stderr, once; a second call does nothing.

    Args:
        names: ``accelerate``, ``deepspeed``.

    Raises:
        ConfigError: another name; or the real one, or a library that has looked for it, was imported already.
    """
    wanted = checked(names)
    new = [name for name in wanted if not stands_in_for(name)]
    for name in wanted:
        _require_not_imported(name)
    for name in new:
        sys.path.insert(0, str(folder(name)))
    os.environ.update(environment(wanted, os.environ))
    if new and os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"shardwise: {said(new)}", file=sys.stderr, flush=True)


def checked(names: Sequence[str]) -> list[str]:
    """The names that are asked for, each once.

    Raises:
        ConfigError: one that Shardwise cannot stand in for, or none.
    """
    if not names:
        raise ConfigError("install_as() without a name", fix=f"one or more of {', '.join(VERSIONS)}")
    for name in names:
        if name not in VERSIONS:
            fix = did_you_mean(str(name), VERSIONS, f"one or more of {', '.join(VERSIONS)}")
            raise ConfigError(f"Shardwise cannot stand in for {name!r}", fix=fix)
    return list(dict.fromkeys(names))


def folder(name: str) -> Path:
    """What goes in front of the path."""
    return _HERE / name


def environment(names: Sequence[str], variables: Mapping[str, str]) -> dict[str, str]:
    """The variable that tells child processes, on top of what it says already."""
    said_already = variables.get("PYTHONPATH")
    before = said_already.split(os.pathsep) if said_already else []
    new = [str(folder(name)) for name in names]
    return {"PYTHONPATH": os.pathsep.join([*new, *(part for part in before if part not in new)])}


def said(names: Sequence[str]) -> str:
    """What the names mean, in one line."""
    imports = " and ".join(f"'import {name}'" for name in names)
    versions = ", ".join(f"{name} {VERSIONS[name]}" for name in names)
    return f"{imports} mean{'s' * (len(names) == 1)} Shardwise in this run and the processes it starts (as {versions})"


def hidden_by(name: str, first: Path) -> Path | None:
    """What a folder in front of all others has under this name, so that it would be imported in our place."""
    candidates = (first / f"{name}.py", first / name / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)


def _require_not_imported(name: str) -> None:
    module = sys.modules.get(name)
    if module is not None:
        if Path(getattr(module, "__file__", None) or "nowhere").is_relative_to(_HERE.parent):
            return
        raise ConfigError(
            f"{name} was imported already, from {getattr(module, '__file__', None)}",
            where="shardwise.install_as",
            fix=f"call it before everything that imports {name}, or start the script by 'shardwise launch --as {name}'",
        )
    looked = [other for other in _LOOKING if other in sys.modules]
    if looked and not stands_in_for(name) and importlib.util.find_spec(name) is None:
        raise ConfigError(
            f"{looked[0]} was imported already, and found no {name}",
            where="shardwise.install_as",
            fix=f"call it before 'import {looked[0]}'",
        )
