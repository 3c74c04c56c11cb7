"""``shardwise launch --as accelerate``: what the ranks import under that name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from shardwise import aliases
from shardwise.cli.console import say
from shardwise.errors import LaunchError


def alias_environment(names: str | None, target: Sequence[str]) -> dict[str, str]:
    """What lets the ranks import Shardwise under other names; said on stderr.

    Raises:
        ShardwiseError: a name that it cannot stand in for, or that means something in the script's own folder.
    """
    if names is None:
        return {}
    wanted = aliases.checked([name for part in names.split(",") if (name := part.strip())])
    first = Path.cwd() if target[0] == "-m" else Path(target[0]).resolve()
    first = first if first.is_dir() else first.parent
    for name in wanted:
        if hidden := aliases.hidden_by(name, first):
            raise LaunchError(f"--as {name}: {hidden} comes first", fix="rename it, or move the script away from it")
    say(f"shardwise: {aliases.said(wanted)}")
    return aliases.environment(wanted, os.environ)
