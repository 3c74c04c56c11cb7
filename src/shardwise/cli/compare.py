"""``shardwise compare``: which strategy is fastest here, for this script?"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardwise.cli.console import say
from shardwise.errors import LaunchError, ShardwiseError
from shardwise.strategy import Strategy

if TYPE_CHECKING:
    from shardwise.report.contest import Predicted, Row

_USUAL = "ddp,zero1,zero2,zero3"
_FEWEST = 3  # the first step is not timed, and neither is the one whose operations are counted


def compare(
    script: Annotated[str, typer.Argument(help="The script to run, or a module name with -m.")],
    args: Annotated[list[str] | None, typer.Argument(help="The script's own arguments, passed on untouched.")] = None,
    strategies: Annotated[
        str, typer.Option(metavar="A;B,...", help="What to compare; ';' between those with keys (zero2,...).")
    ] = _USUAL,
    steps: Annotated[int, typer.Option(help="Steps of each run.")] = 8,
    procs: Annotated[
        int | None, typer.Option("--procs", "-n", help="Ranks. Default: one per accelerator, else 1.")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="On the CPU.")] = False,
    module: Annotated[bool, typer.Option("--module", "-m", help="SCRIPT is a module name, as in python -m.")] = False,
    model: Annotated[
        str | None,
        typer.Option(help="What the script trains, as for 'shardwise plan': predicts time and peak."),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a micro-batch, with --model.")] = None,
    seq: Annotated[int | None, typer.Option(help="Tokens of a row, with --model.")] = None,
    optimizer: Annotated[str, typer.Option(metavar="adamw|sgd|...", help="With --model.")] = "adamw",
    timeout: Annotated[float, typer.Option(help="Seconds that one run may take.")] = 600.0,
    folder: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep records and outputs there, for 'shardwise report'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="To stdout, for other programs.")] = False,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="The table as a page.")] = None,
) -> None:
    """Run a script for a few steps under several strategies, and show what each took beside what was predicted.

    Each is a run of 'shardwise launch' of its own. What fails is a row. Exit codes: 0, 1 if all failed, 2 for a wrong
    request.
    """
    from shardwise.report.contest import Contest, run

    names = _names(strategies)
    if steps < _FEWEST:
        raise LaunchError(f"--steps {steps} leaves no step to time", fix=f"give {_FEWEST} or more")
    if not timeout > 0:
        raise LaunchError(f"--timeout {timeout:g} is no time", fix="give seconds, more than 0")
    if not module and not Path(script).is_file():
        raise LaunchError(f"there is no script '{script}'", fix="name a file, or a module with -m")
    if model is None and (batch is not None or seq is not None):
        raise LaunchError("--batch and --seq belong to --model", fix="give them to the script")
    launcher = [*(["--nproc", str(procs)] if procs is not None else []), *(["--cpu"] if cpu else [])]
    launcher += ["-m"] if module else []
    contest = Contest([script, *(args or [])], steps, launcher, timeout)
    plan = None if model is None else _planner(model, batch, seq, optimizer, procs)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, name in enumerate(names):
            say(f"shardwise: {name} ({number + 1} of {len(names)})")
            where = (folder or Path(temporary)) / f"{number:02d}-{name.replace(',', '-').replace('=', '-')}"
            rows.append(run(contest, name, where, None if plan is None else partial(plan, name)))
    _show(rows, as_json, html, folder is not None)
    if all(row.failure for row in rows):
        raise typer.Exit(1)


def _names(text: str) -> list[str]:
    """Strategies that were named, in their usual form.

    Raises:
        StrategyError: one that does not exist.
        LaunchError: one twice, or none.
    """
    parts = text.split(";") if ";" in text or "=" in text else text.split(",")
    names = [str(Strategy.parse(part.strip())) for part in parts if part.strip()]
    if not names:
        raise LaunchError("--strategies names none", fix=f"--strategies {_USUAL}")
    if len(set(names)) < len(names):
        raise LaunchError("--strategies names one twice", fix="name each once")
    return names


def _planner(
    model: str, batch: int | None, seq: int | None, optimizer: str, procs: int | None
) -> Callable[[str], Predicted]:
    """Raises PlanError if there is no such model."""
    from shardwise.plan.asked import Asked
    from shardwise.plan.prediction import prediction
    from shardwise.report.contest import Predicted

    asked = Asked(model, batch=batch, seq=seq, optimizer=optimizer, precision="no")
    training, machine = asked.training(), asked.machine
    if procs is not None:
        machine = machine.with_devices(procs)
    rates = asked.rates(machine, training)

    def plan(name: str) -> Predicted:
        try:
            found = prediction(training, machine, Strategy.parse(name), rates)
        except ShardwiseError as error:
            say(f"shardwise: no plan for {name}: {error.what}")
            return Predicted()
        return Predicted(step_s=found.timing.seconds if found.timing else None, peak=found.device.nbytes)

    return plan


def _show(rows: Sequence[Row], as_json: bool, html: Path | None, kept: bool) -> None:
    from rich.console import Console

    out = Console(record=html is not None, file=sys.stderr if as_json else sys.stdout, highlight=False)
    out.print(_table(rows))
    for row in rows:
        if row.failure:
            out.print(f"{row.strategy}: {row.failure}", markup=False)
        if kept:
            out.print(f"{row.strategy}: shardwise report {row.folder}", markup=False)
    out.print(
        "Measured: time, memory of a process or device. Counted: rates, states, bytes sent. Predicted: states and "
        "bytes by the formulas of the strategy; time and peak by the planner (--model).", markup=False, style="dim",
    )  # fmt: skip
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    if html is not None:
        try:
            html.write_text(out.export_html(inline_styles=True), encoding="utf-8")
        except OSError as error:
            raise LaunchError(
                f"--html {html}: {error.strerror or error}", fix="name a file that can be written"
            ) from error


def _table(rows: Sequence[Row]) -> Any:
    from rich.table import Table

    from shardwise.report.words import in_words

    def beside(measured: float | None, predicted: float | None, unit: str) -> str:
        text = in_words(measured, unit)
        if predicted is None:
            return text
        off = f" ({(predicted - measured) / measured:+.0%})" if measured else ""
        return f"{text} | {in_words(predicted, unit)}{off}"

    table = Table(title="Measured | predicted", title_justify="left", box=None, padding=(0, 2))
    rate = next((row.unit for row in rows if row.unit), "rows/s")
    for name in ("", "a step", rate, "peak memory", "peak of states", "sent per step"):
        table.add_column(name, justify="left" if not name else "right")
    for row in sorted(rows, key=lambda row: row.step_s if row.step_s is not None else float("inf")):
        if row.failure:
            table.add_row(row.strategy, "failed", *([""] * 4))
            continue
        guess = row.predicted
        table.add_row(
            row.strategy,
            beside(row.step_s, guess.step_s, "s"),
            in_words(row.rate, row.unit),
            beside(row.peak, guess.peak, "bytes"),
            beside(row.states, guess.states, "bytes"),
            beside(row.sent, guess.sent, "bytes"),
        )
    return table
