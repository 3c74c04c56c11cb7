"""A model in host memory that runs on an accelerator: does it move at the speed of the link?

    python benchmarks/gpu_inference.py                        # 1.1 B parameters in bf16
    python benchmarks/gpu_inference.py --shape 8b
    PYTHONPATH=tests python benchmarks/gpu_inference.py --tiny --plugin simulated_device

Weights stay in host memory and stream to the device, unit by unit. *Link* copies as many bytes from page-locked memory,
and nothing else; *resident* has everything on the device. Accelerate's ``cpu_offload`` takes part where it is there.
Contenders take turns within each round, and every answer has to be that of the resident model. A model whose weights
take longer to move than to compute with is bound by the link: the goal there is 0.9 of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import ranks
import shardwise
from llama import SHAPES, Llama, LlamaShape
from report import RESULTS, head, paired, quartiles, save, told
from shardwise import device as devices

ASKED = {"one token": (1, 1), "prefill": (1, 512), "batch of 32": (32, 1)}
REACH = 0.9


def fresh(shape: LlamaShape, device: str) -> nn.Module:
    with torch.device(device):
        return Llama(shape, checkpointing=False).to(torch.bfloat16).eval().requires_grad_(False)


def written(shape: LlamaShape, folder: Path) -> Path:
    """A file with random weights."""
    torch.manual_seed(0)
    file = folder / "model.safetensors"
    save_file(fresh(shape, "cpu").state_dict(), file)
    return file


class Link:
    """A bare copy of as many bytes to the device, in pieces of a unit's size, from page-locked memory."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        piece = min(nbytes, 256 << 20)
        self.pieces = -(-nbytes // piece)
        self.source = torch.empty(piece, dtype=torch.uint8, pin_memory=devices.can_pin(device))
        self.source.fill_(1)
        self.target = torch.empty(piece, dtype=torch.uint8, device=device)
        self.nbytes = self.pieces * piece

    def __call__(self) -> None:
        for _ in range(self.pieces):
            self.target.copy_(self.source, non_blocking=True)


def accelerated(file: Path, shape: LlamaShape, device: torch.device) -> nn.Module:
    from accelerate import cpu_offload
    from safetensors.torch import load_file

    model = fresh(shape, "meta")
    model.load_state_dict(load_file(file), assign=True)
    return cpu_offload(model, device)


@torch.no_grad()
def measure(shape: LlamaShape, file: Path, device: torch.device, rounds: int) -> dict[str, Any]:
    """Seconds per forward of each contender."""

    def loaded(**homes: str | int) -> nn.Module:
        return shardwise.load(fresh(shape, "meta"), {"norm": device.index or 0, **homes}, checkpoint=file)

    models: dict[str, nn.Module] = {"resident": loaded(**{"": device.index or 0}), "shardwise": loaded(**{"": "cpu"})}
    if importlib.util.find_spec("accelerate") is not None:
        models["cpu_offload"] = accelerated(file, shape, device)
    link = Link(sum(p.nbytes for p in models["resident"].parameters()), device)
    out: dict[str, Any] = {"weights": link.nbytes, "asked": {}}
    for name, (rows, length) in ASKED.items():
        ids = torch.randint(shape.vocab, (rows, length), generator=torch.Generator().manual_seed(0)).to(device)
        expected = models["resident"](ids)
        calls: dict[str, Callable[[], Any]] = {"link": link}
        calls |= {key: partial(model, ids) for key, model in models.items()}
        seconds: dict[str, list[float]] = {key: [] for key in calls}
        for turn in range(rounds + 1):
            keys = list(calls)
            for key in keys[turn % len(keys) :] + keys[: turn % len(keys)]:
                devices.synchronize(device)
                begin = perf_counter()
                found = calls[key]()
                devices.synchronize(device)
                if turn:  # the first round made what is made once
                    seconds[key].append(perf_counter() - begin)
                if found is not None and not torch.equal(found.cpu(), expected.cpu()):
                    raise AssertionError(f"{name}: {key} answers something else than the resident model")
        out["asked"][name] = _told(rows * length, link.nbytes, seconds)
    return out


def _told(tokens: int, nbytes: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
    slower = [max(pair) for pair in zip(seconds["link"], seconds["resident"], strict=True)]
    found = {
        "seconds": {key: quartiles(values) for key, values in seconds.items()},
        "link_gb_per_s": quartiles([nbytes / 1e9 / s for s in seconds["link"]]),
        "tokens_per_s": quartiles([tokens / s for s in seconds["shardwise"]]),
        "speed_over_link": paired(seconds["link"], seconds["shardwise"]),
        "speed_over_the_slower_of_both": paired(slower, seconds["shardwise"]),
    }
    if "cpu_offload" in seconds:
        found["cpu_offload_over_shardwise"] = paired(seconds["cpu_offload"], seconds["shardwise"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--plugin", help="a module to import first, which teaches torch a device type")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: a model of a moment, two rounds")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="for the file of weights")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    kind = ranks.accelerator(args.plugin)
    if args.tiny:
        args.shape, args.rounds = "tiny", 2
    device = torch.device(kind, 0)
    shardwise.init(device)
    folder = Path(tempfile.mkdtemp(prefix="shardwise-gpu-inference-", dir=args.folder))
    try:
        found = measure(SHAPES[args.shape], written(SHAPES[args.shape], folder), device, args.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result = {
        **head(["accelerate"]), "versions": devices.versions(), "device": devices.name(device), "shape": args.shape,
        "dtype": "bf16", "rounds": args.rounds, "reach": REACH, **found,
    }  # fmt: skip
    save(result, args.out / f"gpu-inference-{args.shape}.json")
    for name, row in found["asked"].items():
        peer = row.get("cpu_offload_over_shardwise")
        print(
            f"  {name}: link {row['link_gb_per_s']['median']:.1f} GB/s; ours {told(row['speed_over_link'])} of it, "
            f"{told(row['speed_over_the_slower_of_both'])} of the slower of link and computing"
            + (f"; cpu_offload / ours {told(peer)}" if peer else ""),
            flush=True,
        )


if __name__ == "__main__":
    main()
