"""Section *step*: how much of the disk's own speed an optimizer step with its state on the disk gets.

Each round takes, in an order that changes, three things on the same ranks: a bare loop that reads and writes on the
same disk at once (``tiers.probe``: direct I/O, request size and depth the best of a small grid), a step with the state
on the disk, and a step with the state in memory, which is the update alone. The share is the step's bytes read and
written per second over the bare loop's, taken within a round. A pipeline of two stages is as slow as its slower one:
the *bound* is the larger of the update's time and of the bytes over the bare loop's speed.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

import ranks
from contenders import adamw
from disk import best_of_grid
from gpt import Setting, Shape, batch, loss_of, make_model
from report import head, paired, quartiles, save, told

SHAPE = Shape(layers=16, width=768, heads=12)  # 123 M parameters
QUICK = Shape(layers=4, width=256, heads=4, vocab=512)
WARM_UP = 2


def setting_of(quick: bool) -> Setting:
    return Setting("step", 1, 32, "the optimizer step alone", QUICK if quick else SHAPE)


def share(rank: int, setting: Setting, strategy: str, folder: str, raw: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Seconds of each side on this rank, and the bytes this rank moved."""
    import shardwise
    from shardwise.tiers.probe import Probe

    sides: dict[str, Any] = {}
    for side, home in (("nvme", f"nvme,nvme_path={folder}"), ("memory", "cpu")):
        model = shardwise.fully_shard(
            make_model(setting.shape), strategy=f"{strategy},offload_overlap=false,offload_optimizer={home}"
        )
        optimizer = adamw(model.parameters())
        loss_of(model, batch(setting, 0, rank)).backward()  # the gradients stay for all steps
        sides[side] = (model, optimizer)
        for _ in range(WARM_UP):
            optimizer.step()
    model = sides["nvme"][0]
    shardwise.reset_stats(model)
    sides["nvme"][1].step()
    _drain(model)
    disk = shardwise.stats(model).disk
    counted = torch.tensor([disk.bytes_read, disk.bytes_written])
    dist.all_reduce(counted)
    all_ranks = int(counted.sum())
    chunk, depth = raw
    probe = Probe(folder, all_ranks, chunk=chunk, depth=depth) if rank == 0 else None
    if probe is not None and not probe.direct:
        raise RuntimeError("the disk has no direct I/O: this would measure memory")
    times: dict[str, list[float]] = {"raw": [], "nvme": [], "memory": []}
    shardwise.reset_stats(model)
    for turn in range(rounds):
        order = list(times)
        for side in order[turn % 3 :] + order[: turn % 3]:
            dist.barrier()
            if side == "raw":
                times[side].append(all_ranks / probe.mixed() if probe is not None else 0.0)
                continue
            begin = perf_counter()
            sides[side][1].step()
            if side == "nvme":  # what a step leaves under way belongs to it
                _drain(model)
            times[side].append(perf_counter() - begin)
    stats = shardwise.stats(model)
    if probe is not None:
        probe.close()
    return {
        "times": times,
        "read": int(counted[0]),
        "written": int(counted[1]),
        "disk": {**vars(stats.disk), "hidden": stats.disk.hidden},
        "buffers": stats.peak["offload_buffers"],
    }


def _drain(model: torch.nn.Module) -> None:
    from shardwise.engine.build import require_engine

    for home in {id(u.home): u.home for u in require_engine(model).units if u.home is not None}.values():
        if home.disk is not None:
            home.disk.drain()


def measure(nproc: int, setting: Setting, strategy: str, folder: Path, raw: tuple[int, int], rounds: int) -> dict:
    by_rank = ranks.run(nproc, share, setting, strategy, str(folder), raw, rounds)
    sides = [[r["times"][side] for r in by_rank] for side in ("nvme", "memory")]
    on_disk, in_memory = ([max(turn) for turn in zip(*side, strict=True)] for side in sides)
    bare = by_rank[0]["times"]["raw"]
    bound = [max(a, b) for a, b in zip(bare, in_memory, strict=True)]
    nbytes = by_rank[0]["read"] + by_rank[0]["written"]
    return {
        "ranks": nproc,
        "strategy": strategy,
        "bytes_read": by_rank[0]["read"],
        "bytes_written": by_rank[0]["written"],
        "raw_s": quartiles(bare),
        "step_s": quartiles(on_disk),
        "update_alone_s": quartiles(in_memory),
        "raw_bytes_per_s": quartiles([nbytes / s for s in bare]),
        "step_bytes_per_s": quartiles([nbytes / s for s in on_disk]),
        "share_of_raw": paired(bare, on_disk),
        "update_over_raw": paired(in_memory, bare),
        "share_of_bound": paired(bound, on_disk),
        "disk_of_rank_0": by_rank[0]["disk"],
        "buffers_bytes": by_rank[0]["buffers"],
    }


def main(args: argparse.Namespace) -> dict[str, Any]:
    from shardwise.tiers.mounts import file_system

    setting = setting_of(args.quick)
    rounds = 3 if args.quick else args.rounds
    run = head()
    print("\n".join(f"note: {n}" for n in run["notes"]))
    probe_bytes = (16 if args.quick else 256) << 20
    raw = best_of_grid(args.folder, probe_bytes)
    result = {
        **run,
        "parameters": setting.shape.parameters,
        "rounds": rounds,
        "file_system": file_system(args.folder),
        "raw": {"chunk": raw[0], "depth": raw[1]},
        "threads": os.cpu_count(),
        "runs": [],
    }
    for nproc in args.nproc:
        for extra in ("", ",param_dtype=bf16"):
            row = measure(nproc, setting, args.strategy + extra, args.folder, raw, rounds)
            result["runs"].append(row)
            print(
                f"{nproc} rank(s), {row['strategy']}: step {told(row['step_s'], 1e3, 0)} ms; bare I/O"
                f" {told(row['raw_s'], 1e3, 0)} ms; update alone {told(row['update_alone_s'], 1e3, 0)} ms;"
                f" share of raw {told(row['share_of_raw'])}, of the bound {told(row['share_of_bound'])}",
                flush=True,
            )
    save(result, args.out / "offload-step.json")
    return result
