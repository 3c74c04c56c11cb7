"""The disk tier's throughput over what the disk gives to a bare loop, on the same disk in the same minute.

    python benchmarks/disk.py --folder /mnt/nvme --rounds 20

*Raw* is ``shardwise.tiers.probe``: threads with aligned buffers and direct I/O, no order, no units. Its request size
and depth are the best of a small grid, tried first. *Store* is what the optimizer step does: units of one extent each
and three buffers; unit i+1 is read while unit i-1 is written. Both are measured in turn, the first of them alternating,
and each ratio is taken within one round, so that a disk that other programs use as well hits both alike.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from report import RESULTS, head, paired, quartiles, save, told
from shardwise.tiers.aligned import BufferPool
from shardwise.tiers.disk import CHUNK, DEPTH, DiskStore, DiskTransfer
from shardwise.tiers.mounts import file_system
from shardwise.tiers.probe import Probe

GRID = [(1 << 20, 4), (1 << 20, 8), (4 << 20, 2), (4 << 20, 4), (8 << 20, 4)]
BUFFERS = 3


class Pipeline:
    """Units on the disk, and the three sweeps over them: bytes per second of each."""

    def __init__(self, store: DiskStore, units: int, unit_bytes: int) -> None:
        self.store, self.pool = store, BufferPool(BUFFERS, unit_bytes)
        self.extents = [store.extent(f"unit {i}", unit_bytes) for i in range(units)]
        self.nbytes = units * unit_bytes
        noise = torch.randint(0, 256, (self.pool.buffer_bytes,), dtype=torch.uint8)
        taken = [self.pool.acquire() for _ in range(BUFFERS)]
        for buffer in taken:
            buffer.copy_(noise)
            self.pool.release(buffer)
        self.write()

    def read(self) -> float:
        return self._sweep(reads=True, writes=False)

    def write(self) -> float:
        return self._sweep(reads=False, writes=True)

    def mixed(self) -> float:
        return self._sweep(reads=True, writes=True)

    def _sweep(self, *, reads: bool, writes: bool) -> float:
        start = perf_counter()
        coming: list[tuple[DiskTransfer | None, torch.Tensor]] = []
        following = iter(self.extents)

        def ahead() -> None:
            extent = next(following, None)
            if extent is not None:
                buffer = self.pool.acquire()
                coming.append((self.store.read(extent, buffer) if reads else None, buffer))

        ahead()
        if not writes:
            ahead()  # nothing is kept back for a write
        for extent in self.extents:
            ahead()
            transfer, buffer = coming.pop(0)
            if transfer is not None:
                transfer.wait()
            self.pool.release(buffer, self.store.write(extent, buffer) if writes else None)
        self.store.drain()
        return self.nbytes * (reads + writes) / (perf_counter() - start)


def best_of_grid(folder: Path, nbytes: int) -> tuple[int, int]:
    """The request size and depth with which the bare loop reads and writes at once fastest."""
    seen: dict[tuple[int, int], list[float]] = {}
    for _ in range(3):
        for chunk, depth in GRID:
            with Probe(folder, nbytes, chunk=chunk, depth=depth) as disk:
                seen.setdefault((chunk, depth), []).append(disk.mixed())
    for (chunk, depth), values in seen.items():
        print(f"  raw, {chunk >> 20} MiB x {depth}: {statistics.median(values) / 1e6:.0f} MB/s read and written")
    return max(seen, key=lambda key: statistics.median(seen[key]))


def measure(folder: Path, args: argparse.Namespace, raw_shape: tuple[int, int]) -> dict[str, Any]:
    unit_bytes, nbytes = args.unit_mib << 20, args.units * args.unit_mib << 20
    chunk, depth = raw_shape
    speeds: dict[str, dict[str, list[float]]] = {k: {"raw": [], "store": []} for k in ("read", "write", "mixed")}
    with (
        Probe(folder, nbytes, chunk=chunk, depth=depth) as raw,
        DiskStore(folder, chunk=args.chunk_kib << 10, depth=args.depth, checksum=args.checksum) as store,
    ):
        if not raw.direct:
            raise SystemExit(f"{folder} ({file_system(folder)}) has no direct I/O: this would measure memory")
        pipeline = Pipeline(store, args.units, unit_bytes)
        for turn in range(args.rounds):
            for kind, by_side in speeds.items():
                sides: list[tuple[str, Probe | Pipeline]] = [("raw", raw), ("store", pipeline)]
                for side, subject in sides if turn % 2 == 0 else reversed(sides):
                    by_side[side].append(getattr(subject, kind)())
        stats, peak = store.stats, pipeline.pool.peak_bytes
    result: dict[str, Any] = {"buffers_bytes": peak, "store_stats": vars(stats)}
    for kind, by_side in speeds.items():
        result[kind] = {
            "raw_bytes_per_s": quartiles(by_side["raw"]),
            "store_bytes_per_s": quartiles(by_side["store"]),
            "store_over_raw": paired(by_side["store"], by_side["raw"]),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="The disk tier beside a bare loop on the same disk.")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    parser.add_argument("--units", type=int, default=16)
    parser.add_argument("--unit-mib", type=int, default=32, help="MiB of one unit's extent")
    parser.add_argument("--chunk-kib", type=int, default=CHUNK >> 10, help="KiB of one request of the store")
    parser.add_argument("--depth", type=int, default=DEPTH, help="the store's requests in flight, per direction")
    parser.add_argument("--checksum", action="store_true", help="the store checks what it reads")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    args = parser.parse_args()
    if args.rounds < 2:
        raise SystemExit("quartiles need at least 2 rounds")
    run = head()
    print("\n".join(f"note: {n}" for n in run["notes"]))
    chunk, depth = best_of_grid(args.folder, min(args.units * args.unit_mib << 20, 256 << 20))
    result = {
        **run,
        "file_system": file_system(args.folder),
        "rounds": args.rounds,
        "units": args.units,
        "unit_bytes": args.unit_mib << 20,
        "raw": {"chunk": chunk, "depth": depth},
        "store": {"chunk": args.chunk_kib << 10, "depth": args.depth, "checksum": args.checksum},
        **measure(args.folder, args, (chunk, depth)),
    }
    print(f"{'':6} {'raw MB/s':>9} {'store MB/s':>11}  store / raw (quartiles)")
    for kind in ("read", "write", "mixed"):
        row = result[kind]
        raw, own, ratio = row["raw_bytes_per_s"], row["store_bytes_per_s"], row["store_over_raw"]
        print(f"{kind:6} {raw['median'] / 1e6:9.0f} {own['median'] / 1e6:11.0f}  {told(ratio)}")
    save(result, args.out / ("disk-checksum.json" if args.checksum else "disk.json"))


if __name__ == "__main__":
    main()
