"""Section *peers*: Shardwise and DeepSpeed ZeRO-3 with the same model states away, on the same model and batches.

First each contender alone, in fresh processes: does it train, and how much memory does a rank occupy beyond what it
had after its imports? What fails there is left out, and the file says why. Then all others in one process group in
turns, as in ``peers.py``. Losses must agree.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shutil
import statistics
import tempfile
from typing import Any

import torch.distributed as dist

import ranks
from contenders import Contender
from gpt import Shape, batch
from memory import ResidentMeter, disk_bytes
from offload_contenders import CONTENDERS, STRATEGIES, OffloadSetting, available
from peers import FIRST_TOLERANCE, TOLERANCE, WARM_UP, race
from report import head, paired, quartiles, save, told

SHAPE = Shape(layers=12)  # 44 M parameters
QUICK = Shape(layers=2, width=128, heads=4, vocab=512)
LOW = (2e-2, 5e-2)  # tolerances where gradients are rounded to bf16 at different places
ALONE_S = 420.0


def alone(rank: int, key: str, setting: OffloadSetting, turns: int) -> dict[str, Any]:
    """Memory of one contender on this rank, and its losses."""
    contender = next(c for c in CONTENDERS if c.key == key)
    for name in contender.imports:
        importlib.import_module(name)
    data = [batch(setting, step % 2, rank) for step in range(WARM_UP + turns)]
    dist.barrier()
    meter = ResidentMeter()
    meter.reset()
    trainer = contender.build(setting)
    losses = [trainer.turn(ids) for ids in data[:WARM_UP]]
    out: dict[str, Any] = {"peak_start": meter.peak}
    meter.reset()
    if contender.library == "Shardwise":
        import shardwise

        shardwise.reset_stats(trainer.model)
    before = disk_bytes()
    losses += [trainer.turn(ids) for ids in data[WARM_UP:]]
    after = disk_bytes()
    out |= {"peak": meter.peak, "losses": losses}
    if before is not None and after is not None:
        out |= {f"disk_{k}": (b - a) / turns for k, a, b in zip(("read", "written"), before, after, strict=True)}
    if contender.library == "Shardwise":
        stats = shardwise.stats(trainer.model)
        out["ledger"] = stats.peak_total
    dist.barrier()
    return out


def first_line(error: RuntimeError) -> str:
    """The exception's own line of a rank's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Interrupt"))]
    return (named or lines)[-1][:300]


def trial(field: list[Contender], setting: OffloadSetting, nproc: int, turns: int) -> tuple[dict[str, Any], list[str]]:
    """Every contender alone; the second list has a note per one that does not run here."""
    out: dict[str, Any] = {}
    notes: list[str] = []
    for c in field:
        try:
            by_rank = ranks.run(nproc, alone, c.key, setting, turns, timeout=ALONE_S)
        except RuntimeError as error:
            notes.append(f"{c.library} with {c.stage} ({c.key}) does not run here: {first_line(error)}")
            print(f"note: {notes[-1]}", flush=True)
            continue
        entry = {k: max(r[k] for r in by_rank) for k in by_rank[0] if k != "losses"}
        out[c.key] = entry
        ledger = f", by its own ledger {entry['ledger'] / 1e6:.0f} MB" if "ledger" in entry else ""
        disk = (
            f", disk {entry['disk_read'] / 1e6:.0f} + {entry['disk_written'] / 1e6:.0f}" if "disk_read" in entry else ""
        )
        print(f"  {c.key}: peak {entry['peak'] / 1e6:.0f} MB{ledger}{disk} MB per step", flush=True)
        if "nvme" in c.key and entry.get("disk_written") == 0:
            notes.append(f"{c.library} with {c.stage} ({c.key}) wrote nothing to the disk: its times are memory's")
    return out, notes


def measure_time(field: list[Contender], setting: OffloadSetting, nproc: int, rounds: int) -> dict[str, Any]:
    keys = [c.key for c in field]
    tolerances = (FIRST_TOLERANCE, TOLERANCE) if setting.dtype == "fp32" else LOW
    by_rank = ranks.run(nproc, race, keys, setting, rounds, "offload_contenders", tolerances)
    times = {k: [max(turn) for turn in zip(*(r["times"][k] for r in by_rank), strict=True)] for k in keys}
    out: dict[str, Any] = {"loss_spread": max(r["spread"] for r in by_rank), "contenders": {}}
    for c in field:
        cpu = statistics.median(s for r in by_rank for s in r["cpu"][c.key])
        entry: dict[str, Any] = {"step_s": quartiles(times[c.key]), "cpu_s_per_rank": cpu}
        peer = next((p.key for p in field if p.stage == c.stage and p.library == "DeepSpeed"), None)
        if c.library == "Shardwise" and peer is not None:
            entry["to_deepspeed"] = {"peer": peer, **paired(times[c.key], times[peer])}
        out["contenders"][c.key] = entry
    return out


def choose(keys: list[str] | None, clip: float, dtype: str) -> tuple[list[Contender], list[str]]:
    """Who can take part, and a note on each one that cannot."""
    unknown = set(keys or ()) - {c.key for c in CONTENDERS}
    if unknown:
        raise SystemExit(f"no such contender: {', '.join(unknown)}; there are {', '.join(c.key for c in CONTENDERS)}")
    have_deepspeed = importlib.util.find_spec("deepspeed") is not None
    field, notes = [], []
    for c in CONTENDERS:
        if keys is not None and c.key not in keys:
            continue
        reason = ""
        if c.library == "DeepSpeed":
            reason = "" if have_deepspeed else "deepspeed is not installed"
        elif c.library == "PyTorch" and dtype != "fp32":
            reason = "without masters in fp32 it would not be the same training"
        elif c.key.endswith("backward") and clip:
            reason = "an update in backward cannot clip by the norm of all gradients; see --clip 0"
        else:
            reason = available(STRATEGIES.get(c.key, "ddp"))
        if reason:
            notes.append(f"{c.library} with {c.stage} ({c.key}) skipped: {reason}")
        else:
            field.append(c)
    return field, notes


def main(args: argparse.Namespace) -> None:
    keys = args.contenders.split(",") if args.contenders else None
    field, notes = choose(keys, args.clip, args.dtype)
    for nproc in args.nproc:
        run = head(["deepspeed"])
        run["notes"] += notes
        print("\n".join(f"note: {n}" for n in run["notes"]))
        scratch = tempfile.mkdtemp(prefix="offload-peers-", dir=args.folder)
        setting = OffloadSetting(
            "offload", 1, 64, "micro-batch 1 x 64 tokens", QUICK if args.quick else SHAPE,
            dtype=args.dtype, clip=args.clip, folder=scratch,
        )  # fmt: skip
        try:
            memory, failed = trial(field, setting, nproc, 2 if args.quick else 4)
            run["notes"] += failed
            able = [c for c in field if c.key in memory]
            time = measure_time(able, setting, nproc, 3 if args.quick else args.rounds)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        result = {
            **run, "about": setting.about, "ranks": nproc, "rounds": args.rounds,
            "parameters": setting.shape.parameters,
            "dtype": args.dtype, "clip": args.clip, "memory": memory, "time": time,
            "labels": {c.key: c.label for c in able}, "stages": {c.key: c.stage for c in able},
        }  # fmt: skip
        for c in able:
            row = time["contenders"][c.key]
            ratio = f", {told(row['to_deepspeed'])} x DeepSpeed's" if "to_deepspeed" in row else ""
            print(f"  {c.key}: step {told(row['step_s'], 1e3, 0)} ms{ratio}", flush=True)
        tail = ("" if args.dtype == "fp32" else f"-{args.dtype}") + ("" if args.clip else "-unclipped")
        save(result, args.out / f"offload-peers-{nproc}ranks{tail}.json")
