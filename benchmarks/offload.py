"""What offloading costs on a machine without an accelerator: three sections, each with a JSON file and a picture.

    python benchmarks/offload.py step  --folder /mnt/nvme   # the optimizer step beside the disk's own speed
    python benchmarks/offload.py peers --folder /mnt/nvme   # beside DeepSpeed's offloading, the same model
    python benchmarks/offload.py limit --folder /mnt/nvme   # 12 GiB of training state in 4 GiB of memory
    python benchmarks/offload.py all --quick                # a minute: does everything run?

A strategy key that this version does not have yet is skipped with a note, in the output and in the file.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from report import RESULTS

SECTIONS = ("step", "peers", "limit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=[*SECTIONS, "all", "plot"])
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON files and the pictures")
    parser.add_argument("--quick", action="store_true", help="tiny models and few rounds: no figures to keep")
    parser.add_argument("--rounds", type=int, default=12, help="timed rounds of step and peers")
    parser.add_argument("--nproc", type=int, nargs="+", default=[1, 2], help="numbers of ranks, of step and peers")
    parser.add_argument("--strategy", default="zero3", help="step: the preset")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32", help="peers: dtype to compute in")
    parser.add_argument("--clip", type=float, default=1.0, help="peers: largest norm of the gradient; 0 does not clip")
    parser.add_argument("--contenders", help="peers: comma-separated keys")
    parser.add_argument("--limit-gib", type=float, help="limit: memory of the run; default 4")
    parser.add_argument("--strategies", nargs="+", help="limit: strategies in place of the default one")
    args = parser.parse_args()
    if not args.folder.is_dir():
        raise SystemExit(f"{args.folder} is no folder")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for section in SECTIONS if args.section == "all" else (args.section,):
        if section == "plot":
            continue
        print(f"--- {section}", flush=True)
        if section == "step":
            from offload_step import main as measure
        elif section == "peers":
            from offload_peers import main as measure
        else:
            from offload_limit import main as measure
        measure(args)
    try:
        import offload_plot
    except ImportError as error:
        print(f"no picture: {error.name} is not installed")
        return
    offload_plot.draw_all(args.out)


if __name__ == "__main__":
    sys.exit(main())
