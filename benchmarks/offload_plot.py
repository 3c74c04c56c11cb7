"""The pictures of the offload benchmarks: one beside each JSON file that is there.

python benchmarks/offload_plot.py benchmarks/results
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from plot import FAINT, INK, OTHERS, OURS

ERRORS = {"ecolor": INK, "elinewidth": 0.8, "capsize": 2}


def draw_all(folder: Path, suffix: str = ".svg") -> list[Path]:
    """Draw every result of the offload benchmarks in ``folder``; returns the pictures."""
    out: list[Path] = []
    for path in sorted([*folder.glob("offload-*.json"), *folder.glob("gpu-*.json")]):
        result = json.loads(path.read_text())
        kinds = {"runs": step, "time": peers, "limit_bytes": limit, "tokens_per_step": tokens}
        draw = next((draw for key, draw in kinds.items() if key in result), None)
        if draw is None or result.get("arms") == {}:
            continue
        plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "svg.hashsalt": "shardwise"})
        plt.rcParams.update({"text.color": INK, "axes.titlesize": 9.5, "axes.titleweight": "bold"})
        out.append(_save(draw(result), path.with_suffix(suffix)))
    return out


def step(result: dict[str, Any]) -> Figure:
    """The bare loop's speed beside the step's, and the step's share of it."""
    runs = result["runs"]
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(9.6, 0.62 * len(runs) + 1.5), width_ratios=[1.6, 1]
    )
    rows = [float(i) for i in range(len(runs))]
    for key, color, shift, label in (
        ("raw_bytes_per_s", OTHERS, -0.2, "bare direct I/O"),
        ("step_bytes_per_s", OURS, 0.2, "optimizer step"),
    ):
        values = [{k: v / 1e9 for k, v in r[key].items()} for r in runs]
        _bars(left, [r + shift for r in rows], values, [color] * len(runs), 0.38, "{:.2f}", label)
    _bars(right, rows, [r["share_of_raw"] for r in runs], [OURS] * len(runs), 0.5, "{:.2f}")
    right.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    left.set_yticks(rows, [f"{r['ranks']} rank{'s' * (r['ranks'] > 1)}, {_values(r['strategy'])}" for r in runs])
    left.set_ylim(rows[-1] + 0.6, -0.6)
    left.legend(loc="upper center", bbox_to_anchor=(0.35, -0.1), frameon=False, fontsize=8, ncols=2)
    left.set_title("GB/s, read and written at once", loc="left")
    right.set_title("step / bare I/O, by round", loc="left")
    return _finish(figure, f"AdamW of {result['parameters'] / 1e6:.0f} M parameters with its state on a disk. "
                           "Median, quartiles. More is better.")  # fmt: skip


def _values(strategy: str) -> str:
    return "bf16 with fp32 master values" if "bf16" in strategy else "fp32"


def peers(result: dict[str, Any]) -> Figure:
    """Step time over DeepSpeed's with the same states away, and the memory of a rank."""
    times, memory = result["time"]["contenders"], result["memory"]
    keys = [k for k in result["labels"] if k in times and k in memory]
    rows, marks, at = [], [], 0.0
    for i, k in enumerate(keys):
        new = i == 0 or result["stages"][k] != result["stages"][keys[i - 1]]
        at += 1.9 if new else 1.0
        if new:
            marks.append((at - 0.85, result["stages"][k]))
        rows.append(at)
    figure, axes = plt.subplots(1, 3, sharey=True, figsize=(11, 0.27 * at + 1.4), width_ratios=[1.15, 1, 1])
    colors = [OURS if k.startswith("sw-") else OTHERS for k in keys]
    one = {"median": 1.0, "q1": 1.0, "q3": 1.0}
    ratios = [times[k].get("to_deepspeed") or (one if k.startswith("ds-") else None) for k in keys]
    seconds = [{q: v * 1e3 for q, v in times[k]["step_s"].items()} for k in keys]
    _bars(axes[0], rows, seconds, colors, 0.78, "{:.0f}")
    known = [i for i, r in enumerate(ratios) if r is not None]
    _bars(axes[1], [rows[i] for i in known], [ratios[i] for i in known], [colors[i] for i in known], 0.78, "{:.2f}")
    axes[1].axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    _bars(axes[2], rows, [dict.fromkeys(one, memory[k]["peak"] / 1e6) for k in keys], colors, 0.78, "{:.0f}")
    axes[0].set_yticks(rows, [result["labels"][k] for k in keys])
    for label, k in zip(axes[0].get_yticklabels(), keys, strict=True):
        label.set_color(OURS if k.startswith("sw-") else INK)
    for y, text in marks:
        axes[0].annotate(text, (0, y), (0, 0), textcoords="offset points", va="center", fontsize=8.5, color=FAINT)
    axes[0].set_ylim(at + 0.6, -0.1 + rows[0] - 1.4)
    axes[0].set_title("step, ms", loc="left")
    axes[1].set_title("step, DeepSpeed's = 1, by round", loc="left")
    axes[2].set_title("peak memory per rank, MB", loc="left")
    clip = f"clipped at {result['clip']:g}" if result["clip"] else "not clipped"
    return _finish(figure, f"GPT, {result['parameters'] / 1e6:.0f} M parameters, {result['dtype']}, AdamW, {clip}; "
                           f"{result['ranks']} gloo rank{'s' * (result['ranks'] > 1)}; {result['about']}. "
                           "Median, quartiles. Less is better.")  # fmt: skip


def limit(result: dict[str, Any]) -> Figure:
    """Memory used beside the limit and the training state, and the losses of what trained."""
    gib = 2**30
    arms = list(result["arms"].items())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 0.55 * len(arms) + 2.0), width_ratios=[1.6, 1])
    rows, names = [0.0], ["training state of the model"]
    left.barh(rows, [result["state_bytes"] / gib], color=OTHERS, height=0.6)
    left.annotate(f"{result['state_bytes'] / gib:.1f}", (result["state_bytes"] / gib, 0), (4, 0),
                  textcoords="offset points", va="center")  # fmt: skip
    for i, (strategy, arm) in enumerate(arms, 1):
        trained = arm["exit"] == 0
        rows.append(float(i))
        names.append(strategy.replace(",", ",\n"))
        used = (arm.get("peak_bytes") or result["limit_bytes"]) / gib
        left.barh([i], [used], color=OURS if trained else "white", edgecolor=OURS if trained else OTHERS, height=0.6)
        text = f"{'' if arm.get('peak_bytes') else 'at most '}{used:.2f}: trains" if trained else "out of memory"
        if not trained and not arm["as_expected"]:
            text = "failed otherwise"
        edge = max(used, result["limit_bytes"] / gib)
        left.annotate(text, (edge, i), (4, 0), textcoords="offset points", va="center")
        if trained:
            losses = [s["loss"] for s in arm["steps"]]
            right.plot(range(1, len(losses) + 1), losses, color=OURS, marker="o", markersize=3, linewidth=1.2)
    left.axvline(result["limit_bytes"] / gib, color=INK, linewidth=0.8, linestyle=":")
    left.set_yticks(rows, names, fontsize=8)
    left.set_ylim(rows[-1] + 0.6, -0.6)
    left.set_xlim(0, 1.15 * result["state_bytes"] / gib)
    left.set_title("GiB of memory (dotted: the limit)", loc="left")
    right.set_title("loss by step", loc="left")
    right.spines["left"].set_color(OTHERS)
    right.xaxis.get_major_locator().set_params(integer=True)
    given = ", ".join(f"{k}={v}" for k, v in result.get("environment", {}).items())
    caption = f"GPT, {result['parameters'] / 1e6:.0f} M parameters, fp32, AdamW; one process"
    return _finish(figure, f"{caption}; {given}." if given else f"{caption}.", keep=right)


def tokens(result: dict[str, Any]) -> Figure:
    """Tokens per second by home and library, and the device's peak memory (the host's, where there is no device)."""
    arms = result["arms"]
    rows = [float(i) for i in range(len(arms))]
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(10.5, 0.32 * len(arms) + 1.4))
    colors = [OURS if k.startswith("sw-") else OTHERS for k in arms]
    _bars(left, rows, [a["tokens_per_s"] for a in arms.values()], colors, 0.76, "{:.0f}")
    where = "device" if all("device_peak" in a for a in arms.values()) else "host"
    peaks = [a[f"{where}_peak"] / 2**30 for a in arms.values()]
    _bars(right, rows, [dict.fromkeys(("median", "q1", "q3"), p) for p in peaks], colors, 0.76, "{:.2f}")
    left.set_yticks(rows, [result["labels"][k] for k in arms])
    left.set_ylim(rows[-1] + 0.6, -0.6)
    left.set_title("tokens/s (median, quartiles)", loc="left")
    right.set_title(f"peak {where} memory per rank, GiB", loc="left")
    caption = (
        f"Llama shape, {result['parameters'] / 1e9:.2f} B parameters, bf16 with fp32 master values, AdamW; "
        f"{result['tokens_per_step']} tokens per step; {result['ranks']} rank(s)."
    )
    return _finish(figure, caption)


def _bars(
    axis: Axes, rows: Sequence[float], values: Sequence[dict[str, float]], colors: Sequence[str], height: float,
    form: str, label: str | None = None,
) -> None:  # fmt: skip
    """Horizontal bars with quartiles and the median in figures."""
    middle = [v["median"] for v in values]
    spread = [[v["median"] - v["q1"] for v in values], [v["q3"] - v["median"] for v in values]]
    axis.barh(rows, middle, color=colors, height=height, label=label)
    if any(any(side) for side in spread):
        axis.errorbar(middle, rows, xerr=spread, fmt="none", **ERRORS)
    for row, v in zip(rows, values, strict=True):
        axis.annotate(form.format(v["median"]), (v["q3"], row), (5, 0), textcoords="offset points", va="center")
    axis.set_xlim(0, max(axis.get_xlim()[1], 1.15 * max(v["q3"] for v in values)))


def _finish(figure: Figure, caption: str, keep: Axes | None = None) -> Figure:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines["left"].set_visible(axis is keep)
        axis.spines["bottom"].set_color(OTHERS)
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", colors=FAINT, length=2)
    figure.text(0.01, 0.015, caption, fontsize=8, color=FAINT)
    figure.tight_layout(rect=(0, 0.05, 1, 1), w_pad=2)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, facecolor="white", dpi=160)
    plt.close(figure)
    return path


if __name__ == "__main__":
    print("\n".join(str(p) for p in draw_all(Path(sys.argv[1]), *sys.argv[2:])))
