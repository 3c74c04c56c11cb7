"""What is here: versions, accelerators and what they can do, cores and memory. Printed, and kept beside the results."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import ranks
from report import RESULTS, head, save
from shardwise import device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plugin", help="a module to import first, which teaches torch a device type")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    ranks.load(args.plugin)
    kind = device.accelerator()
    devices = [torch.device(kind, index) for index in range(device.count())] if kind is not None else []
    found = [device.facts(one) | {"peak_flops": device.peak_flops(one)} for one in devices]
    result = {**head(["deepspeed"]), "versions": device.versions(), "accelerator": kind, "accelerators": found}
    print(json.dumps(result, indent=2))
    save(result, args.out / "gpu-environment.json")


if __name__ == "__main__":
    main()
