"""The page: one HTML file that holds all it needs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from shardwise.errors import MissingPackage, RecordError
from shardwise.report import figures, timelines
from shardwise.report.facts import COUNTED, MEASURED, Facts
from shardwise.report.figures import Figure
from shardwise.report.words import in_words


def write_page(facts: Facts, path: Path) -> None:
    """Write the page of a run.

    Args:
        path: of the file, 5 MB, nearly all of it plotly's own code.

    Raises:
        MissingPackage: plotly is not installed.
        RecordError: the file cannot be written.
    """
    text = page(facts, _plotly())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RecordError(f"it cannot be written: {error.strerror or error}", where=str(path)) from error


def _plotly() -> str:
    """The code of the library that draws."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise MissingPackage(
            "the page is drawn with plotly, which is not installed", fix="pip install 'shardwise[report]'"
        ) from error
    return str(get_plotlyjs())


def page(facts: Facts, library: str) -> str:
    """The whole text.

    Args:
        library: plotly's code.
    """
    run, first = facts.run, facts.run.ranks[0]
    drawn: dict[str, Figure] = {}
    parts = [_head(facts), _cards(facts)]
    parts += [f'<p class="note">{escape(text)}</p>' for text in facts.notes]

    def add(key: str, title: str, figure: Figure | None, caption: str) -> None:
        if figure is None:
            return
        drawn[key] = figure
        parts.append(
            f'<h2>{escape(title)}</h2><figure><div class="plot" id="plot-{key}" data-figure="{key}" '
            f'style="min-height:{figure["layout"]["height"]}px"></div><figcaption>{escape(caption)}</figcaption></figure>'
        )

    add("loss", "Loss", figures.of_loss(run), f"As the script told it ({MEASURED}).")
    key = "tokens" if all(line["tokens"] is not None for line in first.steps) else "rows"
    add(
        "rate", "Throughput", figures.of_rate(run, key),
        f"{key.capitalize()} {COUNTED}, of all ranks; seconds {MEASURED}, of the slowest. Evaluation is left out.",
    )  # fmt: skip
    parts.append("<h2>Who waits for whom</h2>" + "".join(f"<p>{escape(text)}</p>" for text in facts.slowest))
    add(
        "time", "Where a step's time goes", figures.of_time(facts.ranks),
        f"Mean of a step, {MEASURED}. The second bar of a rank is how much of the first it waited, and for what.",
    )  # fmt: skip
    _add_timelines(facts, drawn, parts)
    most = max(facts.ranks, key=lambda one: one.peak_total).rank
    add(
        "memory", f"Memory by state, rank {most}", figures.of_memory(run, most),
        f"{COUNTED.capitalize()}, the most in each step at turns from phase to phase. What autograd keeps is no state, "
        "and only in what the device tells.",
    )  # fmt: skip
    parts += [_predictions(facts), _table_of_ranks(facts), _sent(facts)]
    data = json.dumps(drawn, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.run)}: Shardwise report</title><style>{_own('page.css')}</style></head><body>"
        + "".join(parts)
        + f'<script type="application/json" id="figures">{data}</script><script>{library}</script>'
        f"<script>{_own('page.js')}</script></body></html>\n"
    )


def _own(name: str) -> str:
    return resources.files("shardwise.report").joinpath(name).read_text(encoding="utf-8")


def _head(facts: Facts) -> str:
    run, first = facts.run, facts.run.ranks[0]
    models = "; ".join(f"{m['name']}, {m['parameters']:,} parameters, under '{m['strategy']}'" for m in first.models)
    device = first.head["device"]
    return (
        f"<h1>Run {escape(run.run)}</h1><p>{escape(models)}</p><p class='soft'>{run.world} "
        f"rank{'s' * (run.world > 1)} on {escape(device['name'])}, torch {escape(first.head['torch'])}</p>"
    )


def _cards(facts: Facts) -> str:
    cards = "".join(
        f'<div class="card"><small>{escape(fact.name)}</small><b>{escape(in_words(fact))}</b>'
        f"<small>{escape(fact.source)}</small></div>"
        for fact in facts.summary
    )
    return f'<div class="cards">{cards}</div>'


def _add_timelines(facts: Facts, drawn: dict[str, Figure], parts: list[str]) -> None:
    run = facts.run
    steps = timelines.steps_in_full(run)
    if not steps:
        parts.append("<h2>Timeline</h2><p>No step is in full: of five steps or more, the third to fifth are.</p>")
        return
    slow = max(facts.ranks, key=lambda one: one.busy_s).rank
    quick = min(facts.ranks, key=lambda one: one.busy_s).rank
    ranks = timelines.ranks_shown(run, [slow, quick])
    for step in steps:
        drawn[f"step-{step}"] = timelines.of_step(run, step, ranks)
    some = "" if len(ranks) == len(run.ranks) else f" {len(ranks)} of {len(run.ranks)} ranks are shown."
    parts.append(
        "<h2>Timeline</h2>" + _choice("plot-timeline", [(f"step-{step}", f"step {step}") for step in steps])
        + _plot("timeline", f"step-{steps[-1]}", drawn)
        + f"<figcaption>{MEASURED.capitalize()}, by the clocks of the hosts. A message or a copy is drawn until "
        f"somebody has waited for it: it may have been over before.{some}</figcaption>"
    )  # fmt: skip
    most = max(facts.ranks, key=lambda one: one.peak_total).rank
    one = next(rank for rank in run.ranks if rank.rank == most)
    inside = [(line["step"], figures.of_memory_inside(one, line)) for line in one.timelines if line["step"] in steps]
    found = {f"inside-{step}": figure for step, figure in inside if figure is not None}
    if found:
        drawn |= found
        parts.append(
            f"<h2>Memory inside a step, rank {most}</h2>"
            + _choice("plot-inside", [(key, key.replace("inside-", "step ")) for key in found])
            + _plot("inside", list(found)[-1], drawn) + f"<figcaption>{COUNTED.capitalize()}.</figcaption>"
        )  # fmt: skip


def _choice(target: str, options: Sequence[tuple[str, str]]) -> str:
    last = options[-1][0]
    inner = "".join(
        f'<option value="{key}"{" selected" * (key == last)}>{escape(text)}</option>' for key, text in options
    )
    return f'<p><select data-for="{target}" aria-label="step" autocomplete="off">{inner}</select></p>'


def _plot(name: str, key: str, drawn: dict[str, Figure]) -> str:
    height = drawn[key]["layout"]["height"]
    return f'<div class="plot" id="plot-{name}" data-figure="{key}" style="min-height:{height}px"></div>'


def _predictions(facts: Facts) -> str:
    if not facts.predictions:
        return ""
    rows = []
    for one in facts.predictions:
        unit = "s" if one.name == "a step" else "bytes"
        measured = in_words(one.measured, unit) if one.measured is not None else "not measured"
        off = f"{one.difference:+.1%}" if one.difference is not None else ""
        rows.append([one.name, in_words(one.predicted, unit), measured, off])
    return "<h2>Predicted beside measured</h2>" + _table(["", "predicted", "here", "off by"], rows)


def _table_of_ranks(facts: Facts) -> str:
    rows = [
        [str(one.rank), in_words(one.step_s, "s"), in_words(one.busy_s, "s"),
         in_words(sum(one.waits.values()), "s"), in_words(one.peak_total, "bytes")]
        for one in facts.ranks
    ]  # fmt: skip
    head = ["rank", f"a step ({MEASURED})", "works", "waits", f"peak of states ({COUNTED})"]
    return "<h2>Ranks</h2>" + _table(head, rows)


def _sent(facts: Facts) -> str:
    rank = facts.ranks[0].rank
    rows = [[way, in_words(nbytes, "bytes")] for way, nbytes in sorted(facts.sent.items()) if nbytes]
    if not rows:
        return ""
    return f"<h2>Bytes of a step, rank {rank}</h2>" + _table(["way", f"sent, or moved ({COUNTED})"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = "".join(f"<th>{escape(text)}</th>" for text in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
