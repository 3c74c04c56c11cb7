"""The ``shardwise`` command: ``launch`` starts a script on several ranks, ``demo`` shows the whole library at work."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from shardwise.cli import demo, launch
from shardwise.cli.console import say
from shardwise.errors import ShardwiseError

app = typer.Typer(
    name="shardwise",
    help="Train PyTorch models under every ZeRO stage.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("launch", context_settings=launch.CONTEXT)(launch.launch)
app.command("demo")(demo.demo)


def _version(asked: bool) -> None:
    if asked:
        from shardwise import __version__

        print(f"shardwise {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train PyTorch models under every ZeRO stage."""


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1 a rank failed, 2 a wrong request, 130 interrupted."""
    try:
        app()
    except ShardwiseError as error:
        say(f"error: {error}")
        sys.exit(2)
