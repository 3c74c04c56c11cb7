"""Two ranks of NCCL on one GPU: does every preset train there as plain torch does? For machines with one device.

    python benchmarks/gpu_two_ranks.py

NCCL refuses two ranks on one device, unless it is told otherwise (``NCCL_MULTI_RANK_GPU_ENABLE=1``, from 2.30) or takes
them for ranks of different hosts (a ``NCCL_HOSTID`` each, which go through sockets). Both ways are tried, each with a
limit, and what came of it is written down either way. On other devices the first try is made without these.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import ranks
from gpu_check import TOLERANCES, compared
from report import RESULTS, head, save
from shardwise import device

PRESETS = ("ddp", "zero1", "zero2", "zero3", "hsdp,shard_size=1")
WAYS: dict[str, dict[str, str]] = {
    "NCCL_MULTI_RANK_GPU_ENABLE": {"NCCL_MULTI_RANK_GPU_ENABLE": "1"},
    "NCCL_HOSTID": {"NCCL_HOSTID": "host-{rank}", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
}


def together(rank: int, kind: str, way: dict[str, str]) -> dict[str, float]:
    """Every preset on one device; by how much each is off, as a part of the change that training made."""
    os.environ.update({name: value.format(rank=rank) for name, value in way.items()})
    if os.path.exists("/sys/class/net/lo"):
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    found = {}
    for preset in PRESETS:
        for low in TOLERANCES:
            difference, change = compared(rank, f"{kind}:0", preset + low)
            found[preset + low] = difference / change
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for each way")
    parser.add_argument("--plugin", help="a module to import first, which teaches torch a device type")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    kind = ranks.accelerator(args.plugin)
    backend = device.backend(torch.device(kind), 2)
    result: dict[str, Any] = {**head(), "device": kind, "name": device.name(torch.device(kind, 0))}
    result |= {"versions": device.versions(), "tried": {}}
    for name, way in WAYS.items() if kind == "cuda" else [("as it is", {})]:
        begin = perf_counter()
        try:
            found = ranks.run(2, together, kind, way, backend=backend, timeout=args.timeout, plugin=args.plugin)[0]
        except RuntimeError as error:
            why = str(error).strip().splitlines()
            result["tried"][name] = {"works": False, "why": [why[0], *why[-3:]]}
            print(f"  {name}: no: {why[-1]}", flush=True)
        else:
            right = all(
                off <= next(t for low, t in reversed(TOLERANCES.items()) if key.endswith(low))
                for key, off in found.items()
            )
            result["tried"][name] = {"works": right, "off": found, "seconds": perf_counter() - begin}
            print(f"  {name}: {'right' if right else 'WRONG'}", flush=True)
        save(result, args.out / "gpu-two-ranks.json")
        if result["tried"][name]["works"]:
            break


if __name__ == "__main__":
    main()
