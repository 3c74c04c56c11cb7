"""Saving and loading checkpoints beside what the disk gives to a bare loop, and what an asynchronous save costs.

    python benchmarks/checkpoint.py --folder /mnt/nvme --rounds 9

*Raw* is the same number of processes that write as many bytes to new files and flush them, or read them past the page
cache: aligned buffers of one block, a few threads each, no checksum, no order. It takes turns with the saves and loads
within each round, and every ratio is taken within one round, so that a disk or a machine that others use as well hits
both alike. Before each load the system is told to forget the files, so that they come from the disk. *Resized* is, on
another number of ranks, a load of what two ranks saved over one of what that number saved. *Stall* is the time until an
asynchronous save returns; the first one, which takes the memory for the copies, is told apart. *Copied* is the time
until an update may change optimizer state, which is copied beside the next forward and backward: if these take less,
the update waits.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import tempfile
import threading
from collections import deque
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ranks import run
from report import RESULTS, head, paired, quartiles, save, told
from shardwise.checkpoint.storage_writer import crc32
from shardwise.tiers.aligned import aligned_empty
from shardwise.tiers.mounts import file_system

CHUNK, DEPTH = 8 << 20, 3


class Net(nn.Module):
    """Square layers: nearly all of the state is in large matrices, as in a transformer."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def trained(strategy: str, width: int, layers: int) -> tuple[nn.Module, torch.optim.Optimizer, int]:
    """Model and optimizer after one step, and the bytes of their state over all ranks."""
    import shardwise

    model = shardwise.fully_shard(Net(width, layers), strategy=strategy, units=nn.Linear)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model(torch.randn(2, width)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer, 3 * 4 * sum(p.numel() for p in model.parameters())


class Raw:
    """This rank's part of a bare write and read."""

    def __init__(self, path: Path, nbytes: int) -> None:
        self.path, self.nbytes = path, -(-nbytes // CHUNK) * CHUNK
        self.buffers = [aligned_empty(CHUNK).random_(0, 256).numpy().data for _ in range(DEPTH)]

    def write(self) -> None:
        self.path.unlink(missing_ok=True)
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        self._sweep(lambda buffer, at: os.pwrite(fd, buffer, at))
        os.fsync(fd)
        os.close(fd)

    def read(self) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECT)
        self._sweep(lambda buffer, at: os.preadv(fd, [buffer], at))
        os.close(fd)

    def _sweep(self, move: Any) -> None:
        offsets = deque(range(0, self.nbytes, CHUNK))

        def serve(buffer: memoryview) -> None:
            while True:
                try:
                    at = offsets.popleft()
                except IndexError:
                    return
                if move(buffer, at) != CHUNK:
                    raise OSError(0, "a request moved fewer bytes than asked for")

        threads = [threading.Thread(target=serve, args=(buffer,)) for buffer in self.buffers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def timed(call: Any) -> tuple[float, Any]:
    """Seconds from when all ranks are here until all have done it, and this rank's result."""
    dist.barrier()
    start = perf_counter()
    result = call()
    dist.barrier()
    return perf_counter() - start, result


def cold(path: Path) -> None:
    """Nothing of a checkpoint is in the page cache."""
    if dist.get_rank() == 0:
        for file in path.iterdir():
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def measure(rank: int, folder: str, args: dict[str, Any]) -> dict[str, Any]:
    from shardwise import checkpoint

    torch.set_num_threads(1)
    path = Path(folder)
    model, optimizer, nbytes = trained("zero3", args["width"], args["layers"])
    things: dict[str, Any] = {"models": [model], "optimizers": [optimizer]}
    raw = Raw(path / f"raw-{rank}", nbytes // dist.get_world_size())
    seconds: dict[str, list[float]] = {}
    calls = {
        "raw_write": raw.write,
        "save": lambda: checkpoint.save(path / "sync", **things),
        "raw_read": raw.read,
        "load": lambda: checkpoint.load(path / "sync", **things),
    }
    for kind in ("raw_write", "save", "raw_read", "load"):
        calls[kind]()  # files, memory and connections are made
    first, handle = timed(lambda: checkpoint.async_save(path / "async", **things))
    handle.wait()
    for turn in range(args["rounds"]):
        for pair in (("raw_write", "save"), ("raw_read", "load")):
            for kind in pair if turn % 2 == 0 else reversed(pair):
                cold(path / "sync")
                seconds.setdefault(kind, []).append(timed(calls[kind])[0])
        stall, handle = timed(lambda: checkpoint.async_save(path / "async", **things))
        seconds.setdefault("stall", []).append(stall)
        copied = stall + timed(handle.wait_for_copy)[0]
        seconds.setdefault("copied", []).append(copied)
        seconds.setdefault("async_total", []).append(copied + timed(handle.wait)[0])
    return {"nbytes": nbytes, "seconds": seconds, "first_stall_s": first}


def loads(rank: int, folder: str, args: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of each load of what another number of ranks saved, and of what this number saved."""
    from shardwise import checkpoint

    torch.set_num_threads(1)
    model, optimizer, _ = trained("zero3", args["width"], args["layers"])
    things: dict[str, Any] = {"models": [model], "optimizers": [optimizer]}
    paths = {"resized": Path(folder) / "sync", "same": Path(folder) / f"by-{dist.get_world_size()}"}
    checkpoint.save(paths["same"], **things)
    seconds: dict[str, list[float]] = {"resized": [], "same": []}
    for turn in range(args["rounds"] + 1):
        for kind in ("resized", "same") if turn % 2 == 0 else ("same", "resized"):
            cold(paths[kind])
            seconds[kind].append(timed(lambda: checkpoint.load(paths[kind], **things))[0])  # noqa: B023
    return {kind: values[1:] for kind, values in seconds.items()}  # the first round made connections and memory


def main() -> None:
    parser = argparse.ArgumentParser(description="Checkpoints beside a bare loop on the same disk.")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    parser.add_argument("--width", type=int, default=1344)
    parser.add_argument("--layers", type=int, default=49, help="the default has 1 GiB of parameters and Adam's state")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--others", type=int, nargs="*", default=[1, 3], help="numbers of ranks that load it as well")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file and the picture")
    args = parser.parse_args()
    if args.rounds < 2:
        raise SystemExit("quartiles need at least 2 rounds")
    about = head()
    print("\n".join(f"note: {n}" for n in about["notes"]))
    shape: dict[str, Any] = {"width": args.width, "layers": args.layers, "rounds": args.rounds}
    folder = tempfile.mkdtemp(prefix="shardwise-checkpoint-", dir=args.folder)
    try:
        found = run(args.nproc, measure, folder, shape)[0]
        resized = {str(n): run(n, loads, folder, shape)[0] for n in args.others}
    finally:
        shutil.rmtree(folder)
    seconds, nbytes = found["seconds"], found["nbytes"]
    result = {
        **about,
        "load_after": [round(x, 2) for x in os.getloadavg()],
        "file_system": file_system(args.folder),
        "ranks": args.nproc,
        "state_bytes": nbytes,
        "rounds": args.rounds,
        "seconds": {kind: quartiles(values) for kind, values in seconds.items()},
        "first_stall_s": found["first_stall_s"],
        "save_over_raw": paired(seconds["raw_write"], seconds["save"]),
        "load_over_raw": paired(seconds["raw_read"], seconds["load"]),
        "stall_over_save": paired(seconds["stall"], seconds["save"]),
        "copied_over_save": paired(seconds["copied"], seconds["save"]),
        "resized_load_s": {n: {kind: quartiles(s) for kind, s in found.items()} for n, found in resized.items()},
        "resized_over_same": {n: paired(found["resized"], found["same"]) for n, found in resized.items()},
        "crc32": crc32.__module__,
    }
    for kind in ("raw_write", "save", "raw_read", "load"):
        print(f"{kind:10} {nbytes / result['seconds'][kind]['median'] / 1e6:7.0f} MB/s")
    print(f"save / raw bandwidth   {told(result['save_over_raw'])}")
    print(f"load / raw bandwidth   {told(result['load_over_raw'])}")
    print(f"stall / save           {told(result['stall_over_save'])}")
    print(f"copied / save          {told(result['copied_over_save'])}")
    for n, ratio in result["resized_over_same"].items():
        print(f"on {n} ranks, what {args.nproc} saved / what {n} saved  {told(ratio)}")
    save(result, args.out / "checkpoint.json")
    if importlib.util.find_spec("matplotlib") is not None:
        draw(result, args.out / "checkpoint.svg")


def draw(result: dict[str, Any], path: Path) -> None:
    """Each ratio with its quartiles, and the goal it is held against."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "shardwise"})
    saved = result["ranks"]
    rows = [
        ("save / raw write", result["save_over_raw"], 0.8, "at least"),
        ("load / raw read", result["load_over_raw"], 0.8, "at least"),
        ("async stall / save", result["stall_over_save"], 0.1, "at most"),
    ]
    for n, ratio in result["resized_over_same"].items():
        rows.append((f"load on {n}: saved by {saved} / by {n}", ratio, 1.5, "at most"))
    figure, axis = plt.subplots(figsize=(7.2, 0.9 + 0.45 * len(rows)))
    for row, (_, ratio, goal, sense) in enumerate(rows):
        axis.barh(row, ratio["median"], color="#1f6feb", height=0.6)
        axis.plot([ratio["q1"], ratio["q3"]], [row, row], color="#24292f", linewidth=1)
        axis.plot([goal, goal], [row - 0.4, row + 0.4], color="#cf222e", linewidth=1.5)
        words = f"{ratio['median']:.2f} ({sense} {goal})"
        axis.annotate(words, (max(ratio["q3"], goal), row), (5, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(rows)), [label for label, *_ in rows])
    axis.invert_yaxis()
    axis.set_xlim(0, 2.1)
    axis.spines[["top", "right"]].set_visible(False)
    busy = " The machine was busy." if result["notes"] else ""
    axis.set_xlabel(f"{result['state_bytes'] / 2**30:.1f} GiB on {result['ranks']} ranks; red: the goal.{busy}")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None}, facecolor="white")
    plt.close(figure)


if __name__ == "__main__":
    main()
