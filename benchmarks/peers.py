"""Shardwise beside DDP, ZeroRedundancyOptimizer, FSDP1, fully_shard and DeepSpeed, on the same model.

    python benchmarks/peers.py --setting comm --nproc 2 --rounds 20

*Time*: all contenders live in one process group and take turns, one training step each, in an order that
rotates from round to round; a contender's time is that of its slowest rank, and its ratio is taken to torch
DDP's time in the same round, so that drifting load hits both alike. CPU time, of all threads of a rank, hardly
depends on what else the machine does. *Memory and wire*: each contender alone,
in fresh processes, measured from outside with the same meters for all. Losses must agree, or the run fails.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

import ranks
from contenders import CONTENDERS, Contender, choose
from gpt import SETTINGS, Setting, batch, make_model
from memory import MemoryMeter, check_meter, written_bytes
from report import RESULTS, head, paired, quartiles, save

WARM_UP = 3  # rounds and, alone, turns
PASSES = 4  # batches, which come again and again: a contender that does not learn them does not train
REFERENCES = ("plain", "ddp", "ddp-views", "fsdp2")  # what every contender is also compared to
FIRST_TOLERANCE, TOLERANCE = 1e-5, 1e-3  # relative, on losses: after the warm-up, and after all rounds


# --- on the ranks --------------------------------------------------------------------------------
def race(
    rank: int,
    keys: list[str],
    setting: Setting,
    rounds: int,
    source: str = "contenders",
    tolerances: tuple[float, float] = (FIRST_TOLERANCE, TOLERANCE),
) -> dict[str, Any]:
    """Every contender's turns on this rank, without the warm-up: seconds, seconds of CPU time of all the
    process's threads, and the largest spread of losses.

    Args:
        source: the module whose ``CONTENDERS`` the keys are of.
        tolerances: relative, on losses: after the warm-up, and after all rounds.
    """
    field = {c.key: c.build(setting) for c in importlib.import_module(source).CONTENDERS if c.key in keys}
    times: dict[str, list[float]] = {k: [] for k in field}
    cpu: dict[str, list[float]] = {k: [] for k in field}
    spread = 0.0
    first: dict[str, float] = {}
    for step in range(WARM_UP + rounds):
        ids = batch(setting, step % PASSES, rank)
        start = step % len(keys)
        losses: dict[str, float] = {}
        for key in keys[start:] + keys[:start]:
            dist.barrier()
            begin, begin_cpu = time.perf_counter(), time.process_time()
            losses[key] = field[key].turn(ids)
            if step >= WARM_UP:
                times[key].append(time.perf_counter() - begin)
                cpu[key].append(time.process_time() - begin_cpu)
        first = first or losses
        middle = statistics.median(losses.values())
        spread = max(spread, max(abs(v - middle) for v in losses.values()) / abs(middle))
        allowed = tolerances[0] if step <= WARM_UP else tolerances[1]
        if spread > allowed or not spread < 1:
            told = ", ".join(f"{k} {v:.6f}" for k, v in losses.items())
            raise AssertionError(f"the contenders' losses differ by {spread:.1e} in round {step}: {told}")
    stuck = [k for k, loss in losses.items() if not loss < first[k]] if rounds >= 2 * PASSES else []
    if stuck:
        raise AssertionError(f"the loss did not fall for {', '.join(stuck)}")
    return {"times": times, "cpu": cpu, "spread": spread}


def alone(rank: int, key: str, setting: Setting, turns: int) -> dict[str, float | None]:
    """Memory and wire bytes of one contender on this rank."""
    contender = next(c for c in CONTENDERS if c.key == key)
    for name in contender.imports:
        importlib.import_module(name)  # what they allocate is not the model's
    check_meter()
    data = [batch(setting, step, rank) for step in range(WARM_UP + 2 * turns)]
    meter = MemoryMeter()
    trainer = contender.build(setting)
    for ids in data[:WARM_UP]:
        trainer.turn(ids)
    with meter:
        for ids in data[WARM_UP : WARM_UP + turns]:
            trainer.turn(ids)
        dist.barrier()  # other ranks may still be receiving what this one holds
    counted: float | None = None
    shared = 0  # which is no block of the allocator's, and is kept
    if contender.library == "Shardwise":
        import shardwise

        shardwise.reset_stats()
    dist.barrier()
    before = written_bytes()
    for ids in data[WARM_UP + turns :]:
        trainer.turn(ids)
    after = written_bytes()
    if contender.library == "Shardwise":
        counted = shardwise.stats().bytes_sent / turns
        shared = shardwise.stats().shared_memory
    wire = None if before is None or after is None else (after - before) / turns
    return {"peak": meter.peak + shared, "states": meter.held, "wire": wire, "counted": counted}


# --- figures -------------------------------------------------------------------------------------
def measure_time(field: list[Contender], setting: Setting, nproc: int, rounds: int) -> dict[str, Any]:
    keys = [c.key for c in field]
    by_rank = ranks.run(nproc, race, keys, setting, rounds)
    times = {k: [max(turn) for turn in zip(*(r["times"][k] for r in by_rank), strict=True)] for k in keys}
    out: dict[str, Any] = {"loss_spread": max(r["spread"] for r in by_rank), "contenders": {}}
    for c in field:
        cpu = statistics.median(s for r in by_rank for s in r["cpu"][c.key])
        entry = {"step_s": quartiles(times[c.key]), "cpu_s_per_rank": cpu, "to_ddp": paired(times[c.key], times["ddp"])}
        cpus = {k: [sum(turn) for turn in zip(*(r["cpu"][k] for r in by_rank), strict=True)] for k in keys}
        for base in REFERENCES:
            if base in keys:
                name = base.replace("-", "_")
                entry[f"to_{name}"] = paired(times[c.key], times[base])
                entry[f"cpu_to_{name}"] = paired(cpus[c.key], cpus[base])
        peers = [p.key for p in field if p.stage == c.stage and p.library != "Shardwise"]
        if c.library == "Shardwise" and peers:
            best = min(peers, key=lambda k: statistics.median(times[k]))
            entry["to_best_peer"] = {"peer": best, **paired(times[c.key], times[best])}
        out["contenders"][c.key] = entry
    return out


def measure_memory(field: list[Contender], setting: Setting, nproc: int, turns: int) -> dict[str, Any]:
    out = {}
    for c in field:
        by_rank = ranks.run(nproc, alone, c.key, setting, turns)
        entry: dict[str, Any] = {"peak": max(r["peak"] for r in by_rank), "states": max(r["states"] for r in by_rank)}
        for kind in ("wire", "counted"):
            known = [r[kind] for r in by_rank if r[kind] is not None]
            entry[kind] = sum(known) / len(known) if known else None
        out[c.key] = entry
        print(f"  {c.label}: peak {entry['peak'] / 1e6:.0f} MB", flush=True)
    return out


def table(field: list[Contender], result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    times = result.get("time", {}).get("contenders", {})
    memory = result.get("memory", {})
    lines = [
        "| contender | stage | step ms | CPU ms | to torch DDP (quartiles) | to best peer of the stage "
        "| peak MB | states MB | wire MB per step | to " + ", ".join(REFERENCES) + " (CPU) |",
        "|---|---|---:|---:|---|---|---:|---:|---:|---|",
    ]
    labels = result["labels"]  # also of contenders measured before
    for c in field:
        t, m = times.get(c.key), memory.get(c.key)
        cells = [c.label, c.stage, *[""] * 8]
        if t:
            r, best = t["to_ddp"], t.get("to_best_peer")
            cells[2] = f"{t['step_s']['median'] * 1e3:.0f}"
            cells[3] = f"{t['cpu_s_per_rank'] * 1e3:.0f}"
            cells[4] = f"{r['median']:.3f} ({r['q1']:.3f} to {r['q3']:.3f})"
            if best:
                cells[5] = f"{best['median']:.3f} ({best['q1']:.3f} to {best['q3']:.3f}), {labels[best['peer']]}"
            names = [base.replace("-", "_") for base in REFERENCES]
            cells[9] = ", ".join(
                f"{t[f'to_{n}']['median']:.2f} ({t[f'cpu_to_{n}']['median']:.2f})" if f"cpu_to_{n}" in t else "-"
                for n in names
            )
        if m:
            cells[6:8] = [f"{m[k] / 1e6:.0f}" for k in ("peak", "states")]
            cells[8] = "" if m["wire"] is None else f"{m['wire'] / 1e6:.1f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--setting", choices=SETTINGS, default="comm")
    parser.add_argument("--nproc", type=int, default=2, help="ranks")
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds, after the warm-up")
    parser.add_argument("--turns", type=int, default=4, help="steps over which memory and wire are measured")
    parser.add_argument("--only", choices=["time", "memory"], help="measure one kind; the other's last figures stay")
    parser.add_argument("--contenders", help="comma-separated: " + ", ".join(c.key for c in CONTENDERS))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file and the plot")
    args = parser.parse_args()
    setting: Setting = SETTINGS[args.setting]
    field, notes = choose(args.contenders.split(",") if args.contenders else None, args.nproc)
    if args.only != "memory" and "ddp" not in [c.key for c in field]:
        raise SystemExit("torch DDP ('ddp') must take part: the ratios are taken to it")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"peers-{setting.name}-{args.nproc}ranks.json"
    result: dict[str, Any] = json.loads(path.read_text()) if args.only and path.exists() else {}
    told = head(["deepspeed"] if any(c.library == "DeepSpeed" for c in field) else [])
    told["notes"] += notes
    threads = max(1, (os.cpu_count() or 1) // args.nproc)
    print(f"{setting.about}; {args.nproc} gloo ranks, {threads} thread(s) each")
    print("\n".join(f"note: {n}" for n in told["notes"]))
    kinds = [args.only] if args.only else ["memory", "time"]
    result |= {
        "setting": setting.name, "about": setting.about, "ranks": args.nproc, "threads_per_rank": threads,
        "parameters": sum(p.numel() for p in make_model(setting.shape).parameters()), "dtype": "fp32",
        "optimizer": "AdamW(fused=True)",
    }  # fmt: skip
    result.setdefault("labels", {}).update({c.key: c.label for c in field})
    result.setdefault("stages", {}).update({c.key: c.stage for c in field})
    if "memory" in kinds:
        result.setdefault("memory", {}).update(measure_memory(field, setting, args.nproc, args.turns))
        result["memory_run"] = told
    if "time" in kinds:
        result["time"] = measure_time(field, setting, args.nproc, args.rounds)
        result["time_run"] = told | {"rounds": args.rounds, "warm_up": WARM_UP}
        print(f"largest relative difference of losses: {result['time']['loss_spread']:.1e}")
    print(table(field, result))
    save(result, path)
    try:
        import plot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    if "time" in result and "memory" in result:
        name = "peers.svg" if (setting.name, args.nproc) == ("comm", 2) else f"{path.stem}.svg"
        plot.draw(result, args.out / name)


if __name__ == "__main__":
    main()
