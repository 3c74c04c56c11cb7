"""Step times, predicted and measured, of small models on the CPU of this machine: how wrong the planner is.

python benchmarks/planner_time.py

Calibrates first, then predicts all steps before one of them has run. Writes JSON and a picture with the identity line.
With --disk FOLDER only steps are taken whose states live on that disk, into a JSON of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import gpt
from report import RESULTS, head, save
from shardwise.plan import probes
from shardwise.plan import ranks as processes
from shardwise.plan.calibrate import calibrate, exactly
from shardwise.plan.machine import Machine
from shardwise.plan.rates import Rates
from shardwise.plan.simulate import Step, simulate
from shardwise.plan.timing import predict
from shardwise.strategy import Strategy


class MLP(nn.Module):
    """Blocks of two wide layers."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(gpt.SmallBlock(width) for _ in range(layers))
        self.head = nn.Linear(width, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def mlp_loss(width: int, rows: int, model: nn.Module) -> torch.Tensor:
    return F.cross_entropy(model(torch.randn(rows, width)), torch.randint(16, (rows,)))


def gpt_loss(vocab: int, length: int, rows: int, model: nn.Module) -> torch.Tensor:
    return gpt.loss_of(model, torch.randint(vocab, (rows, length + 1)))


def adamw(params: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(params)]


SMALL = gpt.Shape(layers=6, width=192, heads=3, vocab=1024)
LARGE = gpt.Shape(layers=4, width=384, heads=6, vocab=2048)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., torch.Tensor], int]] = {
    "gpt-small": (partial(gpt.make_model, SMALL), partial(gpt_loss, SMALL.vocab, 64), 1),
    "gpt-large": (partial(gpt.make_model, LARGE), partial(gpt_loss, LARGE.vocab, 64), 1),
    "mlp": (partial(MLP, 512, 6), partial(mlp_loss, 512), 64),
}
REAL_TIME = (
    "under real-time scheduling, so that other work on this machine does not count; there a message moves while its "
    "rank waits for it, hardly beside computation"
)
ROWS = 4  # of a rank's step, in micro-batches; times 64 for the MLP
SINGLE = [("ddp", 4), ("ddp", 2), ("ddp", 1), ("zero3,activation_checkpointing=true", 4)]
SEVERAL = [
    ("ddp", 4), ("zero1", 4), ("zero2", 4), ("zero3", 4), ("ddp", 1), ("zero2", 2),
    ("zero3,activation_checkpointing=true", 4), ("zero3,param_dtype=bf16", 4),
]  # fmt: skip

ON_DISK = [
    ("zero3,offload_optimizer=nvme", 4), ("zero3,offload_params=nvme,offload_optimizer=nvme", 4), ("zero3", 4),
]  # fmt: skip


class Case(NamedTuple):
    """A step. Those of one model and number of ranks do the same work, and may be chosen between."""

    model: str
    ranks: int
    strategy: str
    rows: int
    disk: str = ""

    @property
    def step(self) -> Step:
        build, loss, times = MODELS[self.model]
        strategy, cpu = Strategy.parse(self.strategy), torch.device("cpu")
        if strategy.offload_optimizer == "nvme":
            strategy = strategy.replace(nvme_path=self.disk)
        loss = partial(loss, self.rows * times)
        return Step(build, loss, adamw, strategy, cpu, self.ranks, self.ranks, ROWS // self.rows, 1.0)


CASES = [Case(model, ranks, *how) for model in MODELS for ranks, hows in ((1, SINGLE), (2, SEVERAL)) for how in hows]


def measured(rank: int, cases: list[Case], count: int) -> list[dict[str, Any]]:
    """On one rank: seconds by phase and of a step of each case."""
    out = []
    for case in cases:
        torch.manual_seed(0)
        phases, seconds = probes.steps(rank, case.step, count)
        out.append({"seconds": seconds, "phases": phases})
    return out


def ranks_of(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    return [float(order.index(i)) for i in range(len(values))]


def _group(row: dict[str, Any]) -> tuple[str, int]:
    """Steps that do the same work to the same numbers, and may be chosen between."""
    return row["model"] + " in bf16" * ("bf16" in row["strategy"]), row["ranks"]


def verdict(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean error, rank correlation, and what choosing by prediction costs, by group."""
    errors = [abs(r["predicted"] / r["measured"] - 1) for r in rows]
    correlation = statistics.correlation(
        ranks_of([r["predicted"] for r in rows]), ranks_of([r["measured"] for r in rows])
    )
    regret = {}
    for group in sorted({_group(r) for r in rows}):
        mine = [r for r in rows if _group(r) == group]
        chosen = min(mine, key=lambda r: r["predicted"])
        regret[f"{group[0]}, {group[1]} ranks"] = chosen["measured"] / min(r["measured"] for r in mine) - 1
    return {
        "mean_error": statistics.mean(errors), "median_error": statistics.median(errors), "worst_error": max(errors),
        "rank_correlation": correlation, "regret": regret, "worst_regret": max(regret.values()),
    }  # fmt: skip


def draw(result: dict[str, Any], path: Path) -> None:
    """Predicted against measured, with the identity line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    from plot import INK, OURS, finish

    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "svg.hashsalt": "shardwise", "text.color": INK})
    figure, axis = plt.subplots(figsize=(5.4, 5.0))
    marks = dict(zip(MODELS, "os^", strict=True))
    for (model, mark), ranks in ((m, n) for m in marks.items() for n in (1, 2)):
        rows = [r for r in result["rows"] if r["model"] == model and r["ranks"] == ranks]
        face = OURS if ranks == 2 else "white"
        label = f"{model}, {ranks} rank{'s' * (ranks > 1)}"
        axis.plot(
            [1e3 * r["measured"] for r in rows], [1e3 * r["predicted"] for r in rows], mark, color=OURS,
            markerfacecolor=face, label=label, markersize=6,
        )  # fmt: skip
    low = 0.8e3 * min(min(r["measured"], r["predicted"]) for r in result["rows"])
    high = 1.25e3 * max(max(r["measured"], r["predicted"]) for r in result["rows"])
    axis.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle=":")
    axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    ticks = [t for t in (10, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000) if low <= t <= high]
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(FixedLocator(ticks))
        side.set_major_formatter(ScalarFormatter())
        side.set_minor_locator(NullLocator())
    axis.set_xlabel("measured, ms per step")
    axis.set_ylabel("predicted, ms per step")
    told = result["verdict"]
    axis.set_title(
        f"{len(result['rows'])} steps on a CPU: mean error {told['mean_error']:.1%},\nrank correlation "
        f"{told['rank_correlation']:.2f}, worst regret {told['worst_regret']:.1%}",
        loc="left", fontsize=8.5, fontweight="bold",
    )  # fmt: skip
    axis.legend(frameon=False, fontsize=8)
    finish(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each case")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--disk", type=Path, help="a folder on a disk: take steps with states there")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    result: dict[str, Any] = head()
    if os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR):
        result["notes"].append(REAL_TIME)
    every = CASES
    if args.disk is not None:
        every = [Case(model, ranks, *how, str(args.disk)) for model in MODELS for ranks in (1, 2) for how in ON_DISK]
    cases = [case for case in every if args.only in ", ".join(map(str, case[:-1]))]
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache:  # what was measured before does not count
        found = {f.ranks: f for f in calibrate(2, threads=args.threads, disk=args.disk, folder=Path(cache), told=print)}
    result["calibration_s"] = time.perf_counter() - begun
    begun = time.perf_counter()
    traces = {case: simulate(case.step).trace for case in cases}
    result["simulation_s"] = time.perf_counter() - begun
    print(f"{len(cases)} steps simulated, {result['simulation_s']:.0f} s", flush=True)
    begun = time.perf_counter()
    rows = []
    for ranks in sorted({case.ranks for case in cases}):
        mine = [case for case in cases if case.ranks == ranks]
        known = exactly([traces[case] for case in mine], found[ranks], keep=False)
        print(f"{ranks} ranks: {len(known.exact)} operations measured, {time.perf_counter() - begun:.0f} s", flush=True)
        rates = Rates.measured(Machine.here(ranks, device="cpu"), known)
        predicted = [predict(traces[case], rates) for case in mine]
        fitted = [predict(traces[case], Rates.measured(rates.machine, found[ranks])) for case in mine]
        told = processes.run(ranks, args.threads, measured, mine, args.steps)
        for index, case in enumerate(mine):
            seconds = statistics.mean(one[index]["seconds"] for one in told)
            timing = predicted[index]
            rows.append({
                **{k: v for k, v in case._asdict().items() if k != "disk"}, "measured": seconds,
                "predicted": timing.seconds, "fitted": fitted[index].seconds, "bound": timing.bound,
                "waits": timing.waits, "phases": timing.phases, "measured_phases": told[0][index]["phases"],
            })  # fmt: skip
    result["measuring_s"] = time.perf_counter() - begun
    result |= {"threads": args.threads, "rows": rows, "verdict": verdict(rows)}
    for row in rows:
        share = row["predicted"] / row["measured"] - 1
        print(f"{row['model']:10} {row['ranks']} {row['strategy']:40} {row['rows']} {1e3 * row['measured']:8.1f} ms "
              f"{1e3 * row['predicted']:8.1f} predicted {share:+6.1%}, "
              f"{row['fitted'] / row['measured'] - 1:+6.1%} by curves, {row['bound']}")  # fmt: skip
    print(json.dumps(result["verdict"], indent=1))
    name = "planner-time" if args.disk is None else "planner-time-disk"
    save(result, args.out / f"{name}.json")
    draw(result, args.out / f"{name}.svg")


if __name__ == "__main__":
    main()
