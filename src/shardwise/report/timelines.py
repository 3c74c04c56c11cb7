"""The timeline of one step: lanes per rank of what it computes, sends, moves and waits for."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from shardwise.observe.recorded import RankRecord, RunRecord
from shardwise.report.facts import STAGES
from shardwise.report.figures import COLOURS, WAIT, Figure

MOST_RANKS = 12
MOST_STEPS = 4
_LANES = ("compute", "waits", "gather", "reduce", "other", "stages")
_TRANSFERS = {"gather": "#72b7b2", "reduce": "#eeca3b", "other": "#ff9da6", "stages": "#9d755d"}
_WIDTH = 11  # of a lane's lines, in pixels


def steps_in_full(run: RunRecord) -> list[int]:
    """Steps of which every rank that is here has a timeline, or most have; the first two and the last ones."""
    count: dict[int, int] = {}
    for one in run.ranks:
        for line in one.timelines:
            if len(line["phases"]) > 1:
                count[line["step"]] = count.get(line["step"], 0) + 1
    steps = sorted(step for step, n in count.items() if n == max(count.values()))
    return steps if len(steps) <= MOST_STEPS else [*steps[:2], *steps[2 - MOST_STEPS :]]


def ranks_shown(run: RunRecord, named: Sequence[int]) -> list[int]:
    """All ranks, or where they are many those that are named, and others evenly."""
    ranks = [one.rank for one in run.ranks]
    if len(ranks) <= MOST_RANKS:
        return ranks
    spread = [ranks[k * len(ranks) // MOST_RANKS] for k in range(MOST_RANKS)]
    return sorted(set(list(dict.fromkeys([*named, *spread]))[:MOST_RANKS]))


def of_step(run: RunRecord, step: int, ranks: Sequence[int]) -> Figure:
    """Times are milliseconds since the first of these ranks began the step, by their hosts' clocks."""
    shown = [(one, line) for one in run.ranks if one.rank in ranks for line in one.timelines if line["step"] == step]
    zero = min(one.head["time"] * 1e6 + line["phases"][0][0] for one, line in shown)
    lines = _Lines()
    ticks: list[tuple[float, str]] = []
    level = 0.0
    for one, line in shown:
        spans = _spans(one, line, one.head["time"] * 1e6 - zero)
        for lane in _LANES:
            if not spans[lane]:
                continue
            level -= 1
            ticks.append((level, f"{one.rank} {lane}"))
            for name, colour, since, until, text in spans[lane]:
                lines.add(name, colour, since, until, level, text)
        level -= 0.5
    layout = {
        "height": 110 + round(-level * 20), "hovermode": "closest",
        "xaxis": {"title": {"text": "ms"}, "automargin": True},
        "yaxis": {
            "tickvals": [at for at, _ in ticks], "ticktext": [text for _, text in ticks], "automargin": True,
            "fixedrange": True, "showgrid": False, "zeroline": False, "range": [level - 0.2, -0.3],
        },
    }  # fmt: skip
    return {"data": lines.traces(), "layout": layout}


Span = tuple[str, str, float, float, str]
"""Name in the legend, colour, from and to in milliseconds, text."""


def _spans(one: RankRecord, line: dict[str, Any], shift: float) -> dict[str, list[Span]]:
    names = [escape(name) for name in line["names"]]
    out: dict[str, list[Span]] = {lane: [] for lane in _LANES}

    def at(time: int) -> float:
        return round((time + shift) / 1e3, 3)

    for k, (since, phase, unit) in enumerate(line["phases"][:-1]):
        until = line["phases"][k + 1][0]
        text = f"{names[phase]} {names[unit]}".strip()
        colour = COLOURS.get(line["names"][phase], COLOURS["step"])
        out["compute"].append((names[phase], colour, at(since), at(until), f"{text}: {(until - since) / 1e3:.3f} ms"))
    for since, until, way, what, beside in line["waits"]:
        text = f"waits for {names[way]} {names[what]}: {(until - since) / 1e3:.3f} ms" + beside * " (a thread beside)"
        if not beside:
            out["waits"].append(("waits", WAIT, at(since), at(until), text))
    mark = max(1, (line["phases"][-1][0] - line["phases"][0][0]) // 300)  # where only the beginning is known
    for since, ended, way, what, nbytes in line["transfers"]:
        lane = "stages" if line["names"][way] in STAGES else names[way] if names[way] in _LANES else "other"
        until = ended if ended is not None else since + mark
        told = f"at most {(until - since) / 1e3:.3f} ms" if ended is not None else "not waited for in this step"
        text = f"{names[way]} {names[what]}, {nbytes / 1e6:.3f} MB: {told}"
        out[lane].append((lane if lane != "other" else "other messages", _TRANSFERS[lane], at(since), at(until), text))
    return out


class _Lines:
    """Thick lines, of one colour in one trace: thousands of them are one path, where bars are as many elements."""

    def __init__(self) -> None:
        self._traces: dict[str, Figure] = {}

    def add(self, name: str, colour: str, since: float, until: float, level: float, text: str) -> None:
        trace = self._traces.setdefault(
            name,
            {
                "type": "scatter", "mode": "lines", "x": [], "y": [], "text": [], "name": name, "hoverinfo": "text",
                "line": {"color": colour, "width": _WIDTH}, "connectgaps": False,
            },
        )  # fmt: skip
        trace["x"] += [since, until, None]
        trace["y"] += [level, level, None]
        trace["text"] += [text, text, ""]

    def traces(self) -> list[Figure]:
        return list(self._traces.values())
