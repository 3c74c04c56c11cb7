"""Reading a folder that DeepSpeed wrote, with optimizer state, beside a bare read of the same bytes.

    python benchmarks/deepspeed_checkpoint.py --folder /mnt/nvme --width 2048 --layers 16 --rounds 9

The folder is written by the exporter, in DeepSpeed's layout. *Bare* is a loop of ``readinto`` through one buffer of
8 MiB over all of its files, past nothing, in one process; *load* is :func:`shardwise.checkpoint.load` of the model and
its AdamW on one rank. Both take turns within each round, and the ratio is that of bytes per second. The load reads the
fp32 weights and the state, not the second copy of the weights that a folder of stage 1 or 2 has. Before each read the
system is told to forget the files. *Host* is the process's peak while it loads above its size before, in MiB: the
state it fills is there already, so it is what loading needs beside it.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import nn

from shardwise import checkpoint

_BLOCK = 8 << 20


def built(width: int, layers: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose state is in large matrices, and its optimizer with state."""
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for p in model.parameters():
        state = optimizer.state[p]
        state["step"] = torch.tensor(2.0)
        state["exp_avg"], state["exp_avg_sq"] = torch.rand_like(p), torch.rand_like(p)
    return model, optimizer


def forget(folder: Path) -> None:
    """Let the next read come from the disk."""
    for file in folder.iterdir():
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def bare(folder: Path) -> int:
    buffer = memoryview(bytearray(_BLOCK))
    total = 0
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while n := file.readinto(buffer):
                total += n
    return total


def resident(which: str) -> float:
    """This process's size, now or at its peak, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1]) / 1024


def rate(work: Callable[[], int], folder: Path) -> float:
    """Bytes per second."""
    forget(folder)
    begin = perf_counter()
    nbytes = work()
    return nbytes / (perf_counter() - begin)


def measure(folder: Path, width: int, layers: int, stage: int, ranks: int, rounds: int) -> dict[str, float]:
    """Write a folder of ``stage`` as ``ranks`` would have, and read it ``rounds`` times in both ways.

    Returns:
        ``bare`` and ``load`` in bytes per second, the median of their ``ratio``, and ``host`` in MiB.
    """
    model, optimizer = built(width, layers)
    nbytes = 3 * sum(p.nbytes for p in model.parameters())
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        checkpoint.save(root / "ours", models=[model], optimizers=[optimizer])
        step = checkpoint.export_deepspeed(root / "ours", root / "run", stage=stage, ranks=ranks)

        def load() -> int:
            checkpoint.load(root / "run", models=[model], optimizers=[optimizer])
            return nbytes

        load()  # imports and first allocations
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        pairs = [(rate(lambda: bare(step), step), rate(load, step)) for _ in range(rounds)]
        host = resident("VmHWM") - before
    return {
        "bare": median(a for a, _ in pairs),
        "load": median(b for _, b in pairs),
        "ratio": median(b / a for a, b in pairs),
        "host": host,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    for stage in (1, 2, 3):
        found = measure(given.folder, given.width, given.layers, stage, given.ranks, given.rounds)
        print(
            f"stage {stage}: bare {found['bare'] / 1e9:.2f} GB/s, load {found['load'] / 1e9:.2f} GB/s, "
            f"ratio {found['ratio']:.2f}, host +{found['host']:.0f} MiB"
        )


if __name__ == "__main__":
    main()
