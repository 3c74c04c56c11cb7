"""Section *limit*: train a model in a fraction of the memory that its training state takes.

A GPT of many thin layers with at least 12 GiB of fp32 training state (values, gradients and two moments: 16 bytes per
parameter) trains in 4 GiB: parameters and optimizer state live on the disk, and each unit's update runs as soon as its
gradients are there. Built on the meta device, the whole model is never in memory. The same script without offload must
be seen to fail there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from time import perf_counter
from typing import Any

import limits
from gpt import Setting, Shape, batch, loss_of, make_model
from offload_contenders import available
from report import head, save

SHAPE = Shape(layers=66, width=1024, heads=16)  # 844 M parameters, 12.6 GiB of training state
QUICK = Shape(layers=24, width=512, heads=8, vocab=1024)  # 77 M, 1.1 GiB
GIB, QUICK_GIB = 4.0, 0.75
STEPS = 4
BYTES = 16  # per parameter
ON_DISK = 12
TIMEOUT_S = 1500.0
WITHOUT = "zero3"
WITH = "zero3,offload_optimizer=nvme,offload_params=nvme,optimizer_in_backward=true"


def train(shape: Shape, strategy: str, steps: int) -> None:
    """What runs under the limit: prints one JSON line per step, and one at the end."""
    import torch

    import shardwise

    torch.manual_seed(0)
    setting = Setting("limit", 1, 64, "", shape)
    begin = perf_counter()
    with torch.device("meta"):
        model = make_model(shape)
    shardwise.fully_shard(model, strategy=strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    shardwise.attach(optimizer)  # what updates in backward wants to know it before
    _tell(built="meta", start_s=perf_counter() - begin)
    ids = batch(setting, 0, 0)
    for _ in range(steps):
        shardwise.reset_stats(model)
        begin = perf_counter()
        loss = loss_of(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        disk = shardwise.stats(model).disk
        _tell(
            loss=loss.item(), step_s=perf_counter() - begin, read=disk.bytes_read, written=disk.bytes_written,
            busy_s=disk.busy_s, wait_s=disk.wait_s, states_peak=shardwise.stats(model).peak_total,
        )  # fmt: skip


def _tell(**values: Any) -> None:
    print(json.dumps(values), flush=True)


def arm(shape: Shape, strategy: str, nbytes: int, steps: int) -> dict[str, Any]:
    """One run under the limit: how it ended, and what it told."""
    order = json.dumps({"shape": vars(shape), "strategy": strategy, "steps": steps})
    done = limits.run([sys.executable, os.path.abspath(__file__), order], nbytes, TIMEOUT_S)
    lines = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
    told = [line for line in done.errors.splitlines() if line.strip()]
    out: dict[str, Any] = {
        "limit": done.kind,
        "exit": done.returncode,
        "killed_for_memory": done.killed,
        "peak_bytes": done.peak,
        "steps": [line for line in lines if "loss" in line],
    }
    out |= next((line for line in lines if "built" in line), {})
    if done.returncode and not done.killed and told:
        out["error"] = told[-1][:300]
    return out


def out_of_memory(entry: dict[str, Any]) -> bool:
    return entry["killed_for_memory"] or "memory" in entry.get("error", "").lower()


def main(args: argparse.Namespace) -> None:
    shape = QUICK if args.quick else SHAPE
    gib = args.limit_gib or (QUICK_GIB if args.quick else GIB)
    nbytes = int(gib * 2**30)
    state = BYTES * shape.parameters
    run = head()
    disk = os.statvfs(args.folder)
    free, needed = disk.f_bavail * disk.f_frsize, int(1.1 * ON_DISK * shape.parameters)
    print(f"{shape.parameters / 1e6:.0f} M parameters, {state / 2**30:.1f} GiB of training state, in {gib:g} GiB")
    if free < needed:
        raise SystemExit(f"{args.folder} has {free / 2**30:.1f} GiB left; this needs {needed / 2**30:.1f} GiB")
    result: dict[str, Any] = {
        **run,
        "parameters": shape.parameters,
        "state_bytes": state,
        "limit_bytes": nbytes,
        "arms": {},
    }
    for strategy in [WITHOUT, *(args.strategies or [WITH])]:
        reason = available(strategy)
        if reason:
            result["notes"].append(f"'{strategy}' skipped: {reason}")
            print(f"note: {result['notes'][-1]}")
            continue
        home = f",nvme_path={args.folder}" if "nvme" in strategy else ""
        entry = result["arms"][strategy] = arm(shape, strategy + home, nbytes, STEPS)
        peak = f"peak {entry['peak_bytes'] / 2**30:.2f} GiB" if entry["peak_bytes"] is not None else "no peak known"
        losses = ", ".join(f"{s['loss']:.3f}" for s in entry["steps"]) or "no step"
        how = "ended well" if not entry["exit"] else "out of memory" if out_of_memory(entry) else "failed otherwise"
        print(f"  {strategy}: {how}; {entry['limit']}, {peak}; losses {losses}")
        if "error" in entry:
            print(f"    {entry['error']}")
    verdict(result)
    save(result, args.out / "offload-limit.json")


def verdict(result: dict[str, Any]) -> None:
    """Without offload it must run out of memory; with it, train: a loss that falls."""
    for strategy, entry in result["arms"].items():
        if strategy == WITHOUT:
            entry["as_expected"] = entry["exit"] != 0 and out_of_memory(entry)
        else:
            losses = [s["loss"] for s in entry["steps"]]
            entry["as_expected"] = entry["exit"] == 0 and len(losses) > 1 and losses[-1] < losses[0]
        if not entry["as_expected"]:
            result["notes"].append(f"'{strategy}' did not do what it should")
            print(f"note: {result['notes'][-1]}")


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    train(Shape(**given["shape"]), given["strategy"], given["steps"])
