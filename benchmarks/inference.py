"""Models that run with weights read in place from their files, beside a bare read, memory, and Accelerate.

    python benchmarks/inference.py --folder /mnt/nvme --rounds 9

*Stream*: forwards of a model whose weights come from the disk each time. *Split*: the same model over several ranks,
each with a prompt of its own. *Load*: time until a model that fits is in memory. *Resident*: what our hooks cost where
nothing moves. Contenders take turns within each round, and every ratio is taken within one round. *Bare* reads the same
files from beginning to end, with as many threads and past the page cache as we do, into the same few buffers
(*bare_kept*: into new memory that holds all of it, whose pages the system has to find); whoever reads through the page
cache finds it empty. Every answer of ours has to be, bit for bit, that of the model in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from inference_model import PageCache, Shape, quiet
from inference_parts import PARTS, about_reads, prepare
from inference_split import split
from report import RESULTS, head, save, told
from shardwise.tiers.mounts import file_system

ALL = {"stream": PARTS["stream"], "split": split, "load": PARTS["load"], "resident": PARTS["resident"]}
TINY = {"hidden": 128, "intermediate": 344, "layers": 4, "rounds": 2, "steps": 4}


def lines(result: dict[str, Any]) -> list[str]:
    """The figures in words."""
    out = []
    if "stream" in result:
        part = result["stream"]
        peak = part["peak_memory"]
        out.append(
            f"stream: {part['streamed_bytes'] / 1e6:.0f} of {part['weights'] / 1e6:.0f} MB come from the disk; peak "
            f"{peak['peak'] / 1e6:.0f} MB, planned {peak['planned'] / 1e6:.0f}"
        )
        for name, s in part["settings"].items():
            seconds = ", ".join(f"{k} {v['median']:.3f} s" for k, v in s["seconds"].items())
            peers = (
                f"; disk_offload / ours {told(s['disk_offload_over_shardwise'])}" if "disk_offload" in seconds else ""
            )
            out.append(
                f"  {name}: {seconds}; ours {s['gb_per_s']['shardwise']['median']:.2f} GB/s, "
                f"{told(s['speed_over_bare']['shardwise'])} of the bare read (at best "
                f"{s['best_speed_over_bare']['median']:.2f}){peers}; {s['waited_for_disk']['median']:.0%} of the time "
                f"waiting for the disk; {'compute' if s['compute_bound'] else 'disk'}-bound, over the slower of both "
                f"{told(s['over_the_slower_of_both'])}"
            )
    if "split" in result:
        for where in ("memory", "disk"):
            part = result["split"][where]
            read = max(part["bytes_read"]) / 1e6
            out.append(
                f"split over {result['split']['ranks']}, {where}: {read:.1f} MB read per rank and forward, formula "
                f"{part['formula'] / 1e6:.1f}; peak memory / planned {part['peak_over_planned']:.2f}"
            )
            for name, s in part["settings"].items():
                rate = s["tokens_per_s"]
                out.append(
                    f"  {name}: {rate['together']:.1f} tokens/s together, {rate['alone']:.1f} alone: "
                    f"{told(s['speed_over_alone'])} times"
                )
    for kind, s in result.get("load", {}).get("seconds", {}).items():
        ratio = result["load"]["speed_over_bare"].get(kind)
        out.append(f"load, {kind}: {s['median']:.3f} s" + (f", {told(ratio)} of the bare speed" if ratio else ""))
    for size, s in result.get("resident", {}).items():
        ms = {k: v["median"] * 1e3 for k, v in s["seconds"].items()} if "seconds" in s else {}
        if ms:
            out.append(
                f"resident, {size}: {ms['shardwise']:.2f} ms, plain {ms['plain']:.2f}: {told(s['over_plain'], 1, 3)}, "
                f"plain against itself {told(s['noise'], 1, 3)}"
            )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="a folder on the disk to measure")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=5504)
    parser.add_argument("--layers", type=int, default=8, help="the default has 1.6 GB of weights, written twice")
    parser.add_argument("--times", type=float, default=4, help="weights over the memory that streaming is allowed")
    parser.add_argument("--nproc", type=int, default=2, help="ranks of the split model")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=100, help="forwards of the small resident model per round")
    parser.add_argument("--only", choices=ALL, help="measure one part; the others' last figures stay")
    parser.add_argument("--fadvise", action="store_true", help="have only our files leave the page cache, not all")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: small sizes, two rounds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file and the plot")
    args = parser.parse_args()
    if args.tiny:
        vars(args).update(TINY)
    if args.rounds < 2:
        raise SystemExit("quartiles need at least 2 rounds")
    quiet()
    cache = PageCache(whole=not args.fadvise)
    shape = Shape(args.hidden, args.intermediate, args.layers)
    path = args.out / "inference.json"
    result: dict[str, Any] = json.loads(path.read_text()) if args.only and path.exists() else {}
    about = head(["transformers", "accelerate", "safetensors"])
    print("\n".join(f"note: {n}" for n in about["notes"]), flush=True)
    folder = Path(tempfile.mkdtemp(prefix="shardwise-inference-", dir=args.folder))
    try:
        nbytes = prepare(folder, shape)
        for name in [args.only] if args.only else list(ALL):
            print(f"measuring: {name}", flush=True)
            found = ALL[name](folder, nbytes, args, cache)
            run = about | {"load_after": [round(x, 2) for x in os.getloadavg()], "rounds": args.rounds}
            run |= {"model": asdict(shape), "dtype": "fp32", "reads": about_reads(cache)}
            result[name] = found
            result.setdefault("runs", {})[name] = run | {"file_system": file_system(args.folder)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(lines(result)))
    save(result, path)
    try:
        import inference_plot
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    inference_plot.draw(result, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
