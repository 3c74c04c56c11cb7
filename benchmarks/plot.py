"""The picture of a peer comparison: paired step-time ratios and peak memory, grouped by ZeRO stage.

python benchmarks/plot.py benchmarks/results/peers-comm-2ranks.json picture.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STAGES = ("none", "ddp", "zero1", "zero2", "zero3", "hsdp")
OURS, OTHERS, INK, FAINT = "#1f6feb", "#b6bec9", "#24292f", "#57606a"


def finish(figure: Any, path: Path) -> None:
    """Take what is not needed from the axes of a scatter plot, and write it."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=FAINT, which="both", length=2)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, facecolor="white", dpi=160)


def draw(result: dict[str, Any], path: Path) -> None:
    """Two panels of horizontal bars; the contenders of a stage stand together."""
    times, memory = result["time"]["contenders"], result["memory"]
    keys = [k for k in result["labels"] if k in times and k in memory]
    keys.sort(key=lambda k: (STAGES.index(result["stages"][k]), k.startswith("sw-")))  # ours last in each stage
    rows: list[float] = []
    at, last = 0.0, None
    for k in keys:
        at += 1.0 if result["stages"][k] == last else 1.55
        last = result["stages"][k]
        rows.append(at)
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "svg.hashsalt": "shardwise", "text.color": INK})
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(9.6, 0.29 * at + 1.3), width_ratios=[1.25, 1])
    colors = [OURS if k.startswith("sw-") else OTHERS for k in keys]
    ratio = [times[k]["to_ddp"] for k in keys]
    middle = [r["median"] for r in ratio]
    errors = [[r["median"] - r["q1"] for r in ratio], [r["q3"] - r["median"] for r in ratio]]
    left.barh(rows, middle, color=colors, height=0.78)
    left.errorbar(middle, rows, xerr=errors, fmt="none", ecolor=INK, elinewidth=0.8, capsize=2)
    left.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    peak = [memory[k]["peak"] / 1e6 for k in keys]
    right.barh(rows, peak, color=colors, height=0.78)
    for row, r in zip(rows, ratio, strict=True):
        left.annotate(f"{r['median']:.2f}", (r["q3"], row), (5, 0), textcoords="offset points", va="center")
    for row, p in zip(rows, peak, strict=True):
        right.annotate(f"{p:.0f}", (p, row), (4, 0), textcoords="offset points", va="center")
    left.set_yticks(rows, [result["labels"][k] for k in keys])
    for label, k in zip(left.get_yticklabels(), keys, strict=True):
        label.set_color(OURS if k.startswith("sw-") else INK)
        label.set_fontweight("bold" if k.startswith("sw-") else "normal")
    left.set_title("step time, torch DDP = 1 (median, quartiles)", loc="left", fontsize=9.5, fontweight="bold")
    right.set_title("peak live memory per rank, MB", loc="left", fontsize=9.5, fontweight="bold")
    left.set_ylim(at + 0.7, rows[0] - 0.7)
    left.set_xlim(0, 1.1 * max(r["q3"] for r in ratio))
    right.set_xlim(0, 1.12 * max(peak))
    for axis in (left, right):
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.spines["bottom"].set_color(OTHERS)
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", colors=FAINT, length=2)
    caption = (
        f"GPT, {result['parameters'] / 1e6:.0f} M parameters, fp32, AdamW; {result['ranks']} gloo ranks on one "
        f"machine; {result['about']}. Less is better."
    )
    figure.text(0.01, 0.012, caption, fontsize=8, color=FAINT)
    figure.tight_layout(rect=(0, 0.035, 1, 1), w_pad=2)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, facecolor="white", dpi=160)
    plt.close(figure)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
