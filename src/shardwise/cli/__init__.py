"""The ``shardwise`` command: ``launch`` starts a script on several ranks (``deepspeed`` does, with the arguments of
DeepSpeed's launcher), ``config`` writes its settings down,
``checkpoint`` looks into checkpoints, ``doctor`` tests this machine, ``generate`` runs a model, ``report`` shows what a
recorded run did, ``demo`` shows the whole library at work.

Importing this does not import torch: ``--help`` answers at once. Commands import what they need when they run.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from shardwise.cli import checkpoint, compare, config, deepspeed, demo, doctor, generate, launch, plan, report
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
app.command("launch", cls=launch.Command, context_settings=launch.CONTEXT)(launch.launch)
app.command("deepspeed", cls=deepspeed.Command, context_settings=launch.CONTEXT)(deepspeed.deepspeed)
app.command("config")(config.config)
app.add_typer(checkpoint.app, name="checkpoint")
app.command("doctor")(doctor.doctor)
app.command("generate")(generate.generate)
app.command("compare", context_settings=launch.CONTEXT)(compare.compare)
app.command("plan")(plan.plan)
app.command("report")(report.report)
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
