"""The planner beside an accelerator: predicted peak memory and step time against measured ones.

    python benchmarks/gpu_planner.py                        # 1.1 B parameters
    PYTHONPATH=tests python benchmarks/gpu_planner.py --tiny --plugin simulated_device

Each plan is made by ``shardwise plan --json`` in a process of its own, for the card that is here. Then the same step
runs for real: the peak is what torch's allocator counted (``max_memory_allocated``), or the meter of this library
where a device counts nothing; the time is the median of some steps. Asked: memory within 3 % at the median, time 10 %.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import ranks
import shardwise
from llama import SHAPES, Llama
from report import RESULTS, head, save
from shardwise import device as devices

CASES = [
    ("ddp,param_dtype=bf16", 4),
    ("ddp,param_dtype=bf16,activation_checkpointing=true", 8),
    ("ddp,param_dtype=bf16,activation_checkpointing=true,offload_optimizer=cpu,offload_grads=cpu", 8),
    (
        "zero3,param_dtype=bf16,activation_checkpointing=true,"
        "offload_params=cpu,offload_optimizer=cpu,offload_grads=cpu",
        8,
    ),
    ("ddp", 2),
]
SHAPE, LENGTH = "SHARDWISE_BENCHMARK_SHAPE", "SHARDWISE_BENCHMARK_LENGTH"  # what the function below is to make


def model(batch: int = 1) -> tuple[nn.Module, Any, Callable[[nn.Module, Any], torch.Tensor]]:
    """What both the planner and the real step take."""
    shape = SHAPES[os.environ.get(SHAPE, "1b")]
    ids = torch.zeros(batch, int(os.environ.get(LENGTH, "2048")), dtype=torch.long)

    def loss(module: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(module(tokens).float().flatten(0, 1), tokens.flatten())

    return Llama(shape, checkpointing=False), ids, loss


def planned(strategy: str, rows: int, card: str) -> dict[str, Any]:
    """What ``shardwise plan`` says; an empty answer where it cannot."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "shardwise", "plan", "gpu_planner:model", "--devices", card, "--batch", str(rows),
               "--strategy", strategy, "--precision", "no", "--nvme", "3GB/s,1TB", "--json"]  # fmt: skip
    path = os.pathsep.join([str(here), str(here.parent / "src")])
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=here, env={**os.environ, "PYTHONPATH": path}, timeout=300
    )
    if not done.stdout.strip():
        print(f"    no plan: {done.stderr.strip().splitlines()[-1:]}")
        return {}
    return json.loads(done.stdout)


def measured(strategy: str, rows: int, device: torch.device, steps: int) -> dict[str, Any]:
    """One real run."""
    reset = getattr(torch.get_device_module(device.type), "reset_peak_memory_stats", None)
    devices.empty_cache()
    if reset is not None:
        reset()
    module, ids, loss = model(rows)
    module.to(device)
    shardwise.fully_shard(module, strategy=strategy)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    tokens = ids.to(device)

    def step() -> None:
        loss(module, tokens).backward()
        shardwise.clip_grad_norm_(module, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with shardwise.memory_meter(module) as meter:
        step()
        step()
    seconds = []
    for _ in range(steps):
        devices.synchronize(device)
        begin = perf_counter()
        step()
        devices.synchronize(device)
        seconds.append(perf_counter() - begin)
    return {
        "seconds": statistics.median(seconds),
        "metered": meter.peak_total,
        "counted": devices.peak_memory(device) if reset else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--card", default="", help="as shardwise plan calls it; by default what the driver says")
    parser.add_argument("--plugin", help="a module to import first, which teaches torch a device type")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    device = torch.device(ranks.accelerator(args.plugin), 0)
    shardwise.init(device)
    os.environ[SHAPE], os.environ[LENGTH] = ("tiny", "64") if args.tiny else ("1b", "2048")
    card = args.card or _card(device)
    found: dict[str, Any] = {**head(), "card": card, "cases": []}
    for strategy, rows in CASES:
        plan = planned(strategy, rows, card)
        real = measured(strategy, rows, device, args.steps)
        peak = real["counted"] or real["metered"]
        case = {"strategy": strategy, "rows": rows, "measured": real, "planned": plan}
        if plan:
            case["memory"] = plan["device"]["bytes"] / peak
            case["time"] = plan["timing"]["seconds"] / real["seconds"]
            print(f"{strategy}, {rows} rows: memory {case['memory']:.3f}, time {case['time']:.2f} of measured")
        found["cases"].append(case)
        save(found, args.out / "gpu-planner.json")  # as each ends: a run that is cut off keeps what it had


def _card(device: torch.device) -> str:
    from shardwise import datasheets

    sheet = datasheets.of_device(devices.name(device))
    return sheet.name if sheet is not None else "H100-80GB"


if __name__ == "__main__":
    main()
