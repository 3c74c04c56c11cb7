"""The part of ``inference.py`` that ranks measure: a model split over them, each with a prompt of its own."""

from __future__ import annotations

import gc
import os
import statistics
from pathlib import Path
from typing import Any

import torch.distributed as dist

import ranks
import shardwise
from inference_model import (
    DECODE,
    LENGTH,
    PREFILL,
    ROOMY,
    Ask,
    PageCache,
    Setting,
    bytes_read,
    in_memory,
    least_memory,
    quiet,
    settle,
    weights,
)
from inference_parts import peak, turns
from report import paired, quartiles

LONG = Setting("long prompt", 1, 192, 0)  # enough to compute that gathers are done beside it
ASKED = {"memory": (PREFILL, DECODE, LONG), "disk": (PREFILL, DECODE)}


def limits(folder: Path) -> dict[str, int]:
    """``max_memory`` by where the shards are to be."""
    return {"memory": ROOMY, "disk": least_memory(folder, 1)}


def steady(model: Any, ask: Ask) -> float:
    """Seconds of one forward of several in a row. Collective if the model is split."""
    ask(model)
    return ask(model)


def race(rank: int, folder: Path, where: str, limit: int, rounds: int) -> dict[str, Any]:
    """Every rank runs a part of the model, and all of it by itself while the others wait, in turns."""
    quiet()
    plain = in_memory(folder)
    asks = {s.name: Ask(plain, s, seed=rank) for s in ASKED[where]}
    del plain
    gc.collect()
    room: Any = {"max_memory": {"cpu": limit}, "batch": 1, "length": LENGTH}
    models = {"together": shardwise.load(folder, "split", **room), "alone": shardwise.load(folder, "auto", **room)}
    for kind, model in models.items():
        homes = set(model.shardwise_plan.homes.values())
        if homes != {"device" if where == "memory" else "nvme"}:
            raise AssertionError(f"{where}, {kind}: weights are in {homes}")
    if rank:
        del models["alone"]
    seconds: dict[str, dict[str, list[float]]] = {s.name: {"together": [], "alone": []} for s in ASKED[where]}
    for name, ask in asks.items():
        for turn in range(rounds + 1):
            for kind in turns(["together", "alone"], turn):
                dist.barrier()
                model = models.get(kind)
                seconds[name][kind].append(0.0 if model is None else steady(model, ask))
                if model is not None:
                    settle(model)
                dist.barrier()
        seconds[name] = {kind: values[1:] for kind, values in seconds[name].items()}
    split = models["together"]
    read = bytes_read(split, asks[PREFILL.name])
    plan = split.shardwise_plan
    streamed = sum(n for unit, n in plan.nbytes.items() if plan.homes[unit] == "nvme")
    return {"seconds": seconds, "bytes_read": read, "streamed": streamed}


def split(folder: Path, nbytes: int, args: Any, cache: PageCache) -> dict[str, Any]:
    """Weights split over ranks, in memory and on the disk."""
    path, count = folder / "large", args.nproc
    out: dict[str, Any] = {
        "ranks": count, "weights": nbytes, "files": len(weights(path)),
        "threads_per_rank": max(1, (os.cpu_count() or 1) // count),
    }  # fmt: skip
    for where, limit in limits(path).items():
        by_rank = ranks.run(count, race, path, where, limit, args.rounds)
        memory = ranks.run(count, peak, folder, "split", limit)
        entry: dict[str, Any] = {
            "max_memory": None if limit == ROOMY else limit,
            "bytes_read": [r["bytes_read"] for r in by_rank],
            "formula": by_rank[0]["streamed"] / count,
            "peak_memory": memory,
            "peak_over_planned": max(m["peak"] / m["planned"] for m in memory),
            "settings": {},
        }
        entry["read_over_formula"] = max(entry["bytes_read"]) / entry["formula"] if entry["formula"] else None
        for setting in ASKED[where]:
            found = [r["seconds"][setting.name] for r in by_rank]
            together = [max(turn) for turn in zip(*(f["together"] for f in found), strict=True)]
            alone = found[0]["alone"]
            one = setting.batch * setting.tokens
            entry["settings"][setting.name] = {
                "seconds": {"together": quartiles(together), "alone": quartiles(alone)},
                "tokens_per_s": {
                    "together": count * one / statistics.median(together), "alone": one / statistics.median(alone),
                },
                "speed_over_alone": paired([count / t for t in together], [1 / a for a in alone]),
            }  # fmt: skip
        out[where] = entry
    return out
