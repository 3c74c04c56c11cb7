"""Figures of a recorded run, as plotly's dictionaries. What they look like in which theme is the page's affair."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from shardwise.observe.recorded import RankRecord, RunRecord
from shardwise.report.facts import RankFacts, number, seconds_of

COLOURS = {
    "forward": "#4c78a8", "loss": "#9ecae9", "backward": "#f58518", "recompute": "#ffbf79",
    "end of backward": "#b279a2", "step": "#54a24b", "evaluation": "#88d27a", "outside": "#8c8c8c",
}  # fmt: skip
WAIT = "#e45756"
_OTHER = ("#72b7b2", "#eeca3b", "#ff9da6", "#9d755d", "#b6992d", "#6b9fd4", "#a0a0d0", "#499894")

Figure = dict[str, Any]


def of_loss(run: RunRecord) -> Figure | None:
    """The mean over ranks at each step; every rank's own, faint, where there are a few."""
    stepped = [one for one in run.ranks if any(line["loss"] is not None for line in one.steps)]
    if not stepped:
        return None
    by_step: dict[int, list[float]] = {}
    for one in stepped:
        for line in one.steps:
            value = _drawn(line["loss"])
            if value is not None:
                by_step.setdefault(line["step"], []).append(value)
    data: list[Figure] = []
    if 1 < len(stepped) <= 8:
        data += [
            _line([s["step"] for s in one.steps], [_drawn(s["loss"]) for s in one.steps], f"rank {one.rank}", "#8c8c8c")
            | {"opacity": 0.35, "showlegend": False}
            for one in stepped
        ]
    steps = sorted(by_step)
    means = [sum(by_step[s]) / len(by_step[s]) for s in steps]
    data.append(_line(steps, means, "mean of the ranks" if len(stepped) > 1 else "loss", COLOURS["forward"]))
    return _figure(data, x="step", y="loss")


def of_rate(run: RunRecord, key: str) -> Figure | None:
    """Tokens or rows per second of all ranks together, step by step, beside seconds per step."""
    stepped = [one for one in run.ranks if one.steps]
    x: list[int] = []
    rate: list[float | None] = []
    seconds: list[float] = []
    for lines in zip(*(one.steps for one in stepped), strict=False):
        took = max(seconds_of(line) for line in lines)
        given = [line[key] for line in lines]
        whole = (
            None if any(n is None for n in given) else sum(n / s["steps"] for n, s in zip(given, lines, strict=True))
        )
        x.append(lines[0]["step"])
        rate.append(whole / took if whole is not None and took else None)
        seconds.append(took * 1e3)
    data = [_line(x, seconds, "ms per step", COLOURS["backward"]) | {"yaxis": "y2"}]
    if any(value is not None for value in rate):
        data.insert(0, _line(x, rate, f"{key}/s", COLOURS["forward"]))
    figure = _figure(data, x="step", y=f"{key}/s")
    figure["layout"]["yaxis2"] = {
        "title": {"text": "ms per step"}, "overlaying": "y", "side": "right", "rangemode": "tozero", "showgrid": False,
        "tickmode": "auto", "automargin": True,
    }  # fmt: skip
    return figure


def of_time(ranks: Sequence[RankFacts]) -> Figure:
    """Where a step's time goes, a bar per rank: phases, and how much of them is waiting, by way."""
    names = [f"rank {one.rank}" for one in ranks]
    data: list[Figure] = []
    for phase, colour in COLOURS.items():
        values = [one.phases.get(phase, 0.0) * 1e3 for one in ranks]
        if any(values):
            data.append(_bar(values, [f"{name} " for name in names], phase, colour))
    ways = sorted({way for one in ranks for way in one.waits})
    shades = [WAIT, *_OTHER]
    for k, way in enumerate(ways):
        values = [one.waits.get(way, 0.0) * 1e3 for one in ranks]
        data.append(_bar(values, [f"{name} waits" for name in names], f"waits: {way}", shades[k % len(shades)]))
    figure = _figure(data, x="ms per step", y="")
    rows = [label for name in reversed(names) for label in (f"{name} waits", f"{name} ")]
    figure["layout"] |= {"barmode": "stack", "height": 140 + 44 * len(names)}
    figure["layout"]["yaxis"] |= {"categoryorder": "array", "categoryarray": rows, "fixedrange": True}
    return figure


def of_memory(run: RunRecord, rank: int) -> Figure:
    """The most bytes by state in each step, of one rank."""
    one = _of(run, rank)
    data = []
    x = [line["step"] for line in one.steps]
    for k, state in enumerate(one.states):
        y = [line["peak"][k] / 1e6 for line in one.steps]
        if any(y):
            data.append(_area(x, y, state, k))
    data.append(_line(x, [line["peak"][-1] / 1e6 for line in one.steps], "together, at one moment", "#8c8c8c"))
    allocated = [line["allocated"] for line in one.steps]
    if any(n is not None for n in allocated):
        data.append(_line(x, [n and n / 1e6 for n in allocated], "of the device, so far", WAIT))
    return _figure(data, x="step", y="MB")


def of_memory_inside(one: RankRecord, line: dict[str, Any]) -> Figure | None:
    """Bytes by state over the time of one step."""
    if not line["memory"]:
        return None
    zero = line["phases"][0][0]
    rows = [*line["memory"], [line["phases"][-1][0], *line["memory"][-1][1:]]]
    x = [(row[0] - zero) / 1e3 for row in rows]
    data = []
    for k, state in enumerate(one.states):
        y = [row[1 + k] / 1e6 for row in rows]
        if any(y):
            area = _area(x, y, state, k)
            area["line"]["shape"] = "hv"
            data.append(area)
    return _figure(data, x="ms", y="MB")


def _drawn(value: Any) -> float | None:
    """A number that can be drawn."""
    found = number(value)
    return found if found is not None and isfinite(found) else None


def _of(run: RunRecord, rank: int) -> RankRecord:
    return next(one for one in run.ranks if one.rank == rank)


def _line(x: Sequence[Any], y: Sequence[Any], name: str, colour: str) -> Figure:
    mode = "lines" if len(x) > 1 else "markers"
    return {"type": "scatter", "mode": mode, "x": list(x), "y": list(y), "name": name, "line": {"color": colour}}


def _area(x: Sequence[Any], y: Sequence[Any], name: str, k: int) -> Figure:
    colours = list(COLOURS.values())[:3] + list(_OTHER)
    colour = colours[(2 * k) % len(colours)]
    return {
        "type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "name": name, "stackgroup": "states",
        "line": {"color": colour, "width": 1},
    }  # fmt: skip


def _bar(values: Sequence[float], labels: Sequence[str], name: str, colour: str) -> Figure:
    return {
        "type": "bar", "orientation": "h", "x": list(values), "y": list(labels), "name": name,
        "marker": {"color": colour}, "hovertemplate": "%{x:.3f} ms<extra>%{fullData.name}</extra>",
    }  # fmt: skip


def _figure(data: list[Figure], x: str, y: str) -> Figure:
    layout = {
        "xaxis": {"title": {"text": x}, "automargin": True}, "height": 320,
        "yaxis": {"title": {"text": y}, "automargin": True, "rangemode": "tozero" if y != "loss" else "normal"},
    }  # fmt: skip
    return {"data": data, "layout": layout}
