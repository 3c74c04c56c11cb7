"""What libraries import from ``accelerate.commands``: to start a script on all ranks, and to show the settings."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from shardwise import aliases
from shardwise.cli import launch, settings_file

default_config_file = str(settings_file.default_path())


@dataclass(frozen=True)
class _File:
    path: Path

    def to_dict(self) -> dict[str, Any]:
        """The settings that it has."""
        return settings_file.read(self.path).settings.said()


def load_config_from_file(config_file: str | None = None) -> _File:
    """The settings of a file of ``shardwise config``, or of Accelerate's; by default those that ``launch`` reads."""
    return _File(Path(default_config_file if config_file is None else config_file))


class _Parser:
    def parse_args(self, args: list[str]) -> Namespace:
        """The arguments of ``shardwise launch``, which looks at them when it is called."""
        return Namespace(arguments=list(args))


def launch_command_parser() -> _Parser:
    """For :func:`launch_command`."""
    return _Parser()


def launch_command(args: Namespace) -> None:
    """``shardwise launch`` with these arguments, under the names that this process imports it by.

    Raises:
        LaunchError: an option of Accelerate's launcher; says what it is here.
        SystemExit: a rank failed.
    """
    names = [name for name in aliases.VERSIONS if str(aliases.folder(name)) in sys.path]
    given = ["--as", ",".join(names), *args.arguments] if names else args.arguments
    app = typer.Typer(add_completion=False)
    app.command("launch", cls=launch.Command, context_settings=launch.CONTEXT)(launch.launch)
    if code := app(given, standalone_mode=False):
        sys.exit(code)
