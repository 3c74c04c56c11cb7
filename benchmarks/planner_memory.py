"""Peaks of live bytes, predicted and measured, of steps on the CPU of this machine: how wrong the planner is.

python benchmarks/planner_memory.py

Predicts all steps, then runs each on as many ranks as it is for and counts every live byte of two steps: the first
makes the optimizer's state. Writes JSON and a picture with the identity line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_map

import planner_models
import ranks
import shardwise
from report import RESULTS, head, save
from shardwise.plan.lora import Lora, adapt
from shardwise.plan.machine import Machine
from shardwise.plan.optimizers import optimizer
from shardwise.plan.prediction import Prediction, Training, prediction
from shardwise.plan.subject import resolve

ADAPTERS = "r=8"


class Case(NamedTuple):
    """A step. ``model``: a function of :mod:`planner_models`, or ``NAME+lora``. ``rows``: of a micro-batch."""

    model: str
    strategy: str
    ranks: int = 2
    optimizer: str = "adamw"
    rows: int = 4
    accumulation: int = 1

    @property
    def clip(self) -> float | None:
        return None if "optimizer_in_backward" in self.strategy else 1.0

    def placed(self, folder: str) -> shardwise.Strategy:
        """The strategy, with its disk in a folder."""
        strategy = shardwise.Strategy.parse(self.strategy)
        return replace(strategy, nvme_path=folder) if "nvme" in self.strategy else strategy


CHECKPOINTED, BF16 = "activation_checkpointing=true", "param_dtype=bf16"
OPTIMIZER, PARAMS = "offload_optimizer=nvme", "offload_params=nvme"
EVERY = [*planner_models.MODELS, "llama+lora"]
CASES = [
    *(Case(model, "ddp", 1) for model in EVERY),
    *(Case(model, preset) for model in EVERY for preset in ("zero2", "zero3")),
    *(Case(model, f"zero3,{CHECKPOINTED}") for model in EVERY),
    *(Case(model, f"zero2,{BF16}", rows=8) for model in ("gpt", "vit", "t5", "moe", "llama+lora")),
    *(Case(model, f"zero3,{OPTIMIZER},{PARAMS}") for model in ("gpt", "llama", "resnet", "moe", "llama+lora")),
    *(Case("llama", "zero1", optimizer=name) for name in ("adamw", "sgd", "momentum", "adagrad")),
    *(Case("gpt", "zero3,layout=tensor", optimizer=name) for name in ("muon", "adafactor")),
    *(Case(model, "hsdp,shard_size=2", 4, rows=2) for model in ("gpt", "llama", "moe", "tied")),
    *(Case("llama", preset, 4, rows=1) for preset in ("ddp", "zero3")),
    *(Case("gpt", "ddp", 1, rows=r) for r in (1, 16)),
    *(Case("llama", f"zero3,{more}", 1) for more in (CHECKPOINTED, BF16, f"{OPTIMIZER},{PARAMS}")),
    *(Case("gpt", f"{preset},optimizer_in_backward=true") for preset in ("ddp", "zero3")),
    Case("llama", f"zero3,optimizer_in_backward=true,{OPTIMIZER}"),
    Case("moe", f"zero2,{OPTIMIZER},offload_ratio=0.5"),
    Case("gpt", f"zero3,{OPTIMIZER},{PARAMS},{CHECKPOINTED},{BF16}", 4, rows=2),
    *(Case("moe", preset, rows=2, accumulation=3) for preset in ("ddp", "zero2")),
]  # fmt: skip


# --- measured ------------------------------------------------------------------------------------------------
def measured(rank: int, cases: list[Case], folder: str) -> list[dict[str, Any]]:
    """On one rank: peaks of each case."""
    torch.set_num_threads(1)
    shardwise.init()
    return [_measured(case, folder) for case in cases]


def _measured(case: Case, folder: str) -> dict[str, Any]:
    torch.manual_seed(0)
    name, plus, _ = case.model.partition("+")
    model, inputs, loss = planner_models.MODELS[name](case.rows)
    if plus:
        model = adapt(model, Lora.parse(ADAPTERS), name)
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    shardwise.fully_shard(model, strategy=case.placed(folder))
    optimizers = optimizer(case.optimizer)(params)
    for one in optimizers:
        shardwise.attach(one)
    whole = case.strategy.startswith(("ddp", "zero1"))
    peaks = []
    for _ in range(2):
        with shardwise.memory_meter(model) as meter:
            for micro in range(case.accumulation):
                last = micro + 1 == case.accumulation
                with shardwise.no_sync(model) if whole and not last else nullcontext():
                    loss(model, tree_map(torch.clone, inputs)).backward()
            if case.clip is not None:
                shardwise.clip_grad_norm_(model, case.clip)
            for one in optimizers:
                one.step()
            for one in optimizers:
                one.zero_grad()
        peaks.append((meter.peak_total, meter.peak))
    nbytes, states = max(peaks, key=lambda told: told[0])
    return {"measured": nbytes, "measured_states": {k: v for k, v in states.items() if v}}


# --- predicted -----------------------------------------------------------------------------------------------
def predicted(case: Case, folder: str) -> tuple[Prediction, float]:
    """The prediction, and how long it took."""
    torch.set_num_threads(1)
    begun = time.perf_counter()
    name, plus, _ = case.model.partition("+")
    subject = resolve(f"planner_models:{name}", batch=case.rows, lora=ADAPTERS if plus else None)
    training = Training(subject, case.optimizer, case.accumulation, case.clip)
    told = prediction(training, Machine.parse(f"{case.ranks}xcpu"), case.placed(folder))
    return told, time.perf_counter() - begun


def row(case: Case, told: Prediction, seconds: float, found: dict[str, Any]) -> dict[str, Any]:
    return {
        **case._asdict(), **found, "predicted": told.device.nbytes, "predicted_states": dict(told.device.states),
        "error": told.device.nbytes / found["measured"] - 1, "at": str(told.device), "prediction_s": round(seconds, 2),
    }  # fmt: skip


def verdict(rows: list[dict[str, Any]]) -> dict[str, float]:
    errors = [r["error"] for r in rows]
    sizes = sorted(map(abs, errors))
    return {
        "cases": len(rows), "exact": sum(r["predicted"] == r["measured"] for r in rows),
        "median_error": statistics.median(sizes), "worst_error": sizes[-1], "furthest_below": min(0.0, *errors),
    }  # fmt: skip


# --- the picture ---------------------------------------------------------------------------------------------
def draw(result: dict[str, Any], path: Path) -> None:
    """Predicted against measured, with the identity line; and how far from it each is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from plot import INK, finish

    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "svg.hashsalt": "shardwise", "text.color": INK})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.4), width_ratios=[1.1, 1])
    for index, (model, mark) in enumerate(zip(EVERY, "os^vDP<X", strict=True)):
        rows = [r for r in result["rows"] if r["model"] == model]
        x = [r["measured"] / 2**20 for r in rows]
        style = {"linestyle": "", "marker": mark, "markersize": 5.5, "color": f"C{index}", "alpha": 0.8, "mew": 0}
        left.plot(x, [r["predicted"] / 2**20 for r in rows], label=model, **style)
        right.plot(x, [100 * r["error"] for r in rows], **style)
    sizes = [r[key] / 2**20 for r in result["rows"] for key in ("measured", "predicted")]
    ends = 0.85 * min(sizes), 1.2 * max(sizes)
    left.plot(ends, ends, color=INK, linewidth=0.8, linestyle=":", zorder=0)
    left.set(xscale="log", yscale="log", xlim=ends, ylim=ends, ylabel="predicted peak, MiB")
    right.axhline(0, color=INK, linewidth=0.8, linestyle=":", zorder=0)
    worst = max(1.0, 120 * result["verdict"]["worst_error"])
    right.set(xscale="log", xlim=ends, ylim=(-worst, worst), ylabel="predicted above measured, %")
    told = result["verdict"]
    left.set_title(
        f"{told['cases']} steps on a CPU, {told['exact']} to the byte: median error {told['median_error']:.2%}, "
        f"worst {told['worst_error']:.2%}",
        loc="left", fontsize=8.5, fontweight="bold",
    )  # fmt: skip
    left.set_yticks([20, 50, 100, 200], ["20", "50", "100", "200"])
    left.legend(frameon=False, fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("measured peak, MiB")
        axis.set_xticks([20, 50, 100, 200], ["20", "50", "100", "200"])
        axis.minorticks_off()
    finish(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases that have all of these words in them")
    parser.add_argument("--processes", type=int, default=2, help="that predict")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    cases = [case for case in CASES if all(word in ", ".join(map(str, case)) for word in args.only.split())]
    result: dict[str, Any] = head(["transformers", "peft"])
    result["notes"] = []  # bytes do not depend on how busy the machine is
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        with ProcessPoolExecutor(args.processes, get_context("spawn")) as pool:
            told = list(pool.map(predicted, cases, [folder] * len(cases)))
        print(f"{len(cases)} steps predicted, {time.perf_counter() - begun:.0f} s", flush=True)
        found: dict[Case, dict[str, Any]] = {}
        for world in sorted({case.ranks for case in cases}):
            begun = time.perf_counter()
            mine = [case for case in cases if case.ranks == world]
            found |= zip(mine, ranks.run(world, measured, mine, folder)[0], strict=True)
            print(f"{len(mine)} steps measured on {world} ranks, {time.perf_counter() - begun:.0f} s", flush=True)
    rows = [row(case, *one, found[case]) for case, one in zip(cases, told, strict=True)]
    result |= {"rows": rows, "verdict": verdict(rows)}
    for r in rows:
        print(f"{r['model']:10} {r['ranks']} {r['strategy']:60} {r['optimizer']:9} {r['rows']:2} {r['measured']:10} "
              f"{r['predicted']:10} {r['error']:+8.3%}  {r['at']}")  # fmt: skip
    print(json.dumps(result["verdict"], indent=1))
    if not args.only:
        save(result, args.out / "planner-memory.json")
        draw(result, args.out / "planner-memory.svg")


if __name__ == "__main__":
    main()
