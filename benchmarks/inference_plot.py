"""The picture of ``inference.py``: its ratios, with quartiles.

python benchmarks/inference_plot.py benchmarks/results/inference.json picture.png
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from plot import FAINT, INK, OTHERS, OURS


class Bar(NamedTuple):
    """A ratio; ``best``: what it could be at most."""

    label: str
    ratio: dict[str, float]
    ours: bool = True
    best: float | None = None
    new: bool = False  # some room above it


def draw(result: dict[str, Any], path: Path) -> None:
    """One panel per question; parts that were not measured are left out."""
    panels = [
        (title, bars, line)
        for title, bars, line in (
            ("read speed, bare read = 1 (more is better)", _speeds(result), 1.0),
            ("time of disk_offload / ours (more is better)", _offload(result), 1.0),
            ("tokens/s of all ranks / of one alone (more is better)", _split(result), 1.0),
            ("time / plain forward in memory (less is better)", _resident(result), 1.0),
        )
        if bars
    ]
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK})
    heights = [sum(1.5 if b.new else 1.0 for b in bars) + 1.2 for _, bars, _ in panels]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8.4, 0.27 * sum(heights) + 0.35 * len(panels) + 0.5), height_ratios=heights,
        squeeze=False,
    )  # fmt: skip
    for axis, (title, bars, line) in zip(axes[:, 0], panels, strict=True):
        _panel(axis, bars, line)
        axis.set_title(title, loc="left", fontsize=9.5, fontweight="bold")
    figure.text(0.01, 0.008, _caption(result), fontsize=8, color=FAINT, va="bottom")
    figure.tight_layout(rect=(0, 0.55 / figure.get_figheight(), 1, 1), h_pad=1.2)
    figure.savefig(path, facecolor="white", dpi=160)
    plt.close(figure)


def _panel(axis: Axes, bars: Sequence[Bar], line: float) -> None:
    rows, at = [], 0.0
    for i, bar in enumerate(bars):
        at += 1.5 if bar.new and i else 1.0
        rows.append(at)
    middle = [b.ratio["median"] for b in bars]
    errors = [[b.ratio["median"] - b.ratio["q1"] for b in bars], [b.ratio["q3"] - b.ratio["median"] for b in bars]]
    axis.barh(rows, middle, color=[OURS if b.ours else OTHERS for b in bars], height=0.78)
    axis.errorbar(middle, rows, xerr=errors, fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
    ends = []
    for row, bar in zip(rows, bars, strict=True):
        end, words = bar.ratio["q3"], f"{bar.ratio['median']:.{3 if bar.ratio['median'] < 0.1 else 2}f}"
        if bar.best is not None:
            axis.plot([bar.best, bar.best], [row - 0.42, row + 0.42], color="#cf222e", linewidth=1.5)
            end, words = max(end, bar.best), f"{words} (at best {bar.best:.2f})"
        axis.annotate(words, (end, row), (5, 0), textcoords="offset points", va="center")
        ends.append(end)
    axis.axvline(line, color=INK, linewidth=0.8, linestyle=":")
    axis.set_yticks(rows, [b.label for b in bars])
    for label, bar in zip(axis.get_yticklabels(), bars, strict=True):
        label.set_color(OURS if bar.ours else INK)
    axis.set_ylim(at + 0.6, rows[0] - 0.6)
    axis.set_xlim(0, 1.3 * max([*ends, line]))
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.spines["bottom"].set_color(OTHERS)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", colors=FAINT, length=2)


def _speeds(result: dict[str, Any]) -> list[Bar]:
    out = []
    for name, s in result.get("stream", {}).get("settings", {}).items():
        ratio, best = s["speed_over_bare"], s["best_speed_over_bare"]["median"]
        out.append(Bar(f"{name}: Shardwise", ratio["shardwise"], best=best, new=True))
        if "disk_offload" in ratio:
            out.append(Bar(f"{name}: disk_offload", ratio["disk_offload"], ours=False))
    words = {"shardwise": "Shardwise", "bare_kept": "a bare read into new memory"}
    for i, (kind, ratio) in enumerate(result.get("load", {}).get("speed_over_bare", {}).items()):
        out.append(Bar(f"load: {words.get(kind, kind)}", ratio, ours=kind == "shardwise", new=i == 0))
    return out


def _offload(result: dict[str, Any]) -> list[Bar]:
    settings = result.get("stream", {}).get("settings", {})
    key = "disk_offload_over_shardwise"
    return [Bar(name, s[key]) for name, s in settings.items() if key in s]


def _split(result: dict[str, Any]) -> list[Bar]:
    part = result.get("split")
    if part is None:
        return []
    return [
        Bar(f"{part['ranks']} ranks, {where}: {name}", s["speed_over_alone"], new=i == 0)
        for where in ("memory", "disk")
        for i, (name, s) in enumerate(part[where]["settings"].items())
    ]


def _resident(result: dict[str, Any]) -> list[Bar]:
    out = []
    for size, s in result.get("resident", {}).items():
        about = f"{size}, {s['weights'] / 1e6:.0f} MB"
        out.append(Bar(f"{about}: Shardwise", s["over_plain"], new=True))
        out.append(Bar(f"{about}: plain, once more", s["noise"], ours=False))
    return out


def _caption(result: dict[str, Any]) -> str:
    run = next(iter(result["runs"].values()))
    model = run["model"]
    weights = next((result[k]["weights"] for k in ("stream", "load", "split") if k in result), None)
    size = "" if weights is None else f", {weights / 1e9:.2f} GB"
    busy = " The machine was busy." if any(r["notes"] for r in result["runs"].values()) else ""
    others = {name: r["model"]["layers"] for name, r in result["runs"].items() if r["model"] != model}
    busy += "".join(f" {name.capitalize()}: {layers} layers." for name, layers in others.items())
    first = (
        f"Llama of {model['layers']} layers, {model['hidden']} wide, fp32{size}; {run['file_system']}, cold. "
        f"Median, quartiles of {run['rounds']} rounds.{busy}"
    )
    second = "At best: computing in memory, or the bare read, whichever takes longer." if "stream" in result else ""
    return f"{first}\n{second}".rstrip()


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
