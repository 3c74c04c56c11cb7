"""``shardwise report``: what a recorded run says."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from shardwise.report.facts import Facts


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN_DIR", help="What 'launch --record' or profile_dir= was given.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The page. Default: report.html in RUN_DIR.")] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the timelines for ui.perfetto.dev.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which run, where RUN_DIR holds several; its beginning will do.")
    ] = None,
    page: Annotated[bool, typer.Option(help="Write the page.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON.")] = False,
) -> None:
    """Show what a recorded run did: numbers here, and all of it on a page.

    Loss, throughput, MFU, memory by state, a timeline per rank, and who waits for whom. The page is one file that needs
    no network. Exit codes: 0, and 2 where there is no record, or a damaged one.
    """
    from shardwise.observe.recorded import read
    from shardwise.report.facts import facts_of
    from shardwise.report.page import write_page
    from shardwise.report.trace import write_trace

    facts = facts_of(read(folder, run))
    written = []
    if trace is not None:
        write_trace(facts.run, trace)
        written.append(trace)
    if page:
        written.append(out if out is not None else folder / "report.html")
        write_page(facts, written[-1])
    if as_json:
        print(json.dumps(_as_json(facts)))
        return
    _show(facts)
    for path in written:
        print(f"written: {path}")


def _as_json(facts: Facts) -> dict[str, Any]:
    return {
        "run": facts.run.run, "world": facts.run.world, "summary": [asdict(fact) for fact in facts.summary],
        "ranks": [asdict(one) for one in facts.ranks], "slowest": facts.slowest, "bytes_per_step": facts.sent,
        "predictions": [{**asdict(one), "difference": one.difference} for one in facts.predictions],
        "notes": facts.notes,
    }  # fmt: skip


def _show(facts: Facts) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from shardwise.report.words import in_words

    console = Console(highlight=False)
    table = Table(title=f"Run {facts.run.run}", title_justify="left", box=None, padding=(0, 2), show_header=False)
    for _ in range(3):
        table.add_column(overflow="fold")
    for fact in facts.summary:
        table.add_row(f"[bold]{escape(fact.name)}[/bold]", in_words(fact), f"[dim]{escape(fact.source)}[/dim]")
    console.print(table)
    if facts.predictions:
        beside = Table(title="Predicted beside measured", title_justify="left", box=None, padding=(0, 2))
        for name in ("", "predicted", "here", "off by"):
            beside.add_column(name, justify="left" if not name else "right")
        for one in facts.predictions:
            unit = "s" if one.name == "a step" else "bytes"
            here = in_words(one.measured, unit) if one.measured is not None else "not measured"
            off = "" if one.difference is None else f"{one.difference:+.1%}"
            beside.add_row(escape(one.name), in_words(one.predicted, unit), here, off)
        console.print(beside)
    for text in [*facts.slowest, *facts.notes]:
        console.print(escape(text))
