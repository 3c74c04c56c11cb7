"""What offloading costs with an accelerator: tokens per second and memory of a Llama-shaped model, by home and library.

    python benchmarks/gpu.py                      # 1.1 B parameters, 32 k tokens per step, every arm
    python benchmarks/gpu.py --shape 8b --rows 4 --accumulate 2
    python benchmarks/gpu.py --check              # is what is measured also right?
    python benchmarks/gpu.py --tiny --device cpu  # does the script run?

bf16 compute with fp32 master values, activation checkpointing, AdamW. Each arm runs in fresh processes, one per
device, and the arms take turns ``--repeats`` times. A loop is timed as a whole, with the device waited for at both
ends only: what a library leaves for the next forward counts, but is not cut off.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist

import ranks
from gpu_arms import ARMS, Job
from gpu_check import check
from llama import SHAPES
from memory import ResidentMeter
from offload_peers import first_line
from report import RESULTS, head, quartiles, save, told
from shardwise import device

WARM_UP = 2
ARM_S = 1800.0
BASE, OWN_CPU, TORCH_CPU = "sw-device", "sw-cpu", "fsdp-cpu"


def batches(job: Job, rank: int, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * rank + step % 2)
    vocab = SHAPES[job.shape].vocab
    return [
        torch.randint(0, vocab, (job.rows, job.length + 1), generator=generator).to(job.device)
        for _ in range(job.accumulate)
    ]


def wait(job: Job) -> None:
    device.synchronize(torch.device(job.device))
    dist.barrier()


def measure(rank: int, key: str, job: Job) -> dict[str, Any]:
    """One arm on this rank."""
    arm = next(a for a in ARMS if a.key == key)
    torch.zeros(1, device=job.device)  # what the driver takes is not the arm's
    if key.startswith("sw"):
        import shardwise

        shardwise.init(job.device)
    meter = ResidentMeter()
    meter.reset()
    begin = perf_counter()
    trainer = arm.build(job)
    data = [batches(job, rank, step) for step in range(2)]
    first = trainer.step(data[0]).item()
    for step in range(1, WARM_UP):
        trainer.step(data[step % 2])
    wait(job)
    out: dict[str, Any] = {"start_s": perf_counter() - begin, "host_peak_start": meter.peak}
    meter.reset()
    if job.device != "cpu":
        torch.accelerator.reset_peak_memory_stats()
    if key.startswith("sw"):
        shardwise.reset_stats(trainer.model)
    seconds = []
    for _ in range(job.loops):
        wait(job)
        begin = perf_counter()
        for step in range(job.steps):
            loss = trainer.step(data[step % 2])
        wait(job)
        seconds.append((perf_counter() - begin) / job.steps)
    out |= {"step_s": seconds, "first_loss": first, "last_loss": loss.item(), "host_peak": meter.peak}
    if job.device != "cpu":
        out["device_peak"] = torch.accelerator.max_memory_allocated()
        out["device_reserved"] = torch.accelerator.max_memory_reserved()
    if key.startswith("sw"):
        stats, count = shardwise.stats(trainer.model), job.loops * job.steps
        out |= {
            "to_host_per_step": stats.to_host / count,
            "to_device_per_step": stats.to_device / count,
            "disk_read_per_step": stats.disk.bytes_read / count,
            "disk_written_per_step": stats.disk.bytes_written / count,
            "disk_hidden": stats.disk.hidden,
            "ledger_peak": stats.peak,
        }
    wait(job)
    return out


def run_arms(
    keys: list[str], job: Job, nproc: int, repeats: int, plugin: str | None, keep: Callable[..., None]
) -> tuple[dict[str, Any], list[str]]:
    """Every arm in turn.

    Args:
        keep: is given the results and notes so far, after each arm: a run that is cut off keeps what it had.
    """
    results: dict[str, Any] = {}
    notes: list[str] = []
    failed: set[str] = set()
    on = torch.device(job.device)
    backend, peak = device.backend(on, nproc), device.peak_flops(on) if on.type != "cpu" else None
    for _ in range(repeats):
        for key in keys:
            if key in failed:
                continue
            try:
                by_rank = ranks.run(nproc, measure, key, job, backend=backend, timeout=ARM_S, plugin=plugin)
            except RuntimeError as error:
                failed.add(key)
                notes.append(f"{key} has no figures: {first_line(error)}")
                print(f"note: {notes[-1]}", flush=True)
                continue
            seconds = [max(turn) for turn in zip(*(r["step_s"] for r in by_rank), strict=True)]
            entry = results.setdefault(key, {"all_step_s": []})
            entry["all_step_s"] += seconds
            entry |= {k: v for k, v in by_rank[0].items() if k != "step_s"}
            for k in ("host_peak", "device_peak", "host_peak_start"):
                if k in by_rank[0]:
                    entry[k] = max(r[k] for r in by_rank)
            entry["tokens_per_s"] = quartiles([nproc * job.tokens / s for s in entry["all_step_s"]])
            used = ""
            if peak is not None:
                flops = SHAPES[job.shape].flops_per_token(job.length)
                entry["mfu"] = entry["tokens_per_s"]["median"] / nproc * flops / peak
                used = f", {entry['mfu']:.1%} of the peak"
            print(f"  {key}: {told(entry['tokens_per_s'], 1, 0)} tokens/s{used}", flush=True)
            keep(results, notes)
    return results, notes


def verdict(arms: dict[str, Any]) -> dict[str, Any]:
    """The ratios that this benchmark is about, where both sides were measured."""
    out: dict[str, Any] = {}

    def ratio(name: str, ours: str, theirs: str, reach: float) -> None:
        if ours in arms and theirs in arms:
            value = arms[ours]["tokens_per_s"]["median"] / arms[theirs]["tokens_per_s"]["median"]
            out[name] = {"ratio": value, "reach": reach}

    for key in ("sw-cpu", "sw-cpu-backward"):
        ratio(f"{key} over no offload", key, BASE, 0.9)
    for key in ("sw-cpu", "sw-cpu-all", "sw-cpu-all-backward"):
        ratio(f"{key} over CPUOffloadPolicy", key, TORCH_CPU, 2.0)
    for ours, theirs in (("sw-cpu", "ds-cpu"), ("sw-cpu-all", "ds-cpu-all"), ("sw-nvme", "ds-nvme")):
        ratio(f"{ours} over {theirs}", ours, theirs, 2.0)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rows", type=int, default=8, help="sequences per micro-batch")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--steps", type=int, default=6, help="steps of one timed loop")
    parser.add_argument("--loops", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=1, help="times that all arms run")
    parser.add_argument("--arms", help="comma-separated: " + ", ".join(a.key for a in ARMS))
    parser.add_argument("--device", help="its type; default: the accelerator's")
    parser.add_argument("--plugin", help="a module to import first, which teaches torch a device type")
    parser.add_argument("--nproc", type=int, help="ranks; default: all devices, one on the CPU")
    parser.add_argument("--tiny", action="store_true", help="a model of a moment: no figures to keep")
    parser.add_argument("--check", action="store_true", help="compare every home with plain torch on the CPU, and end")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk for arms on nvme")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    ranks.load(args.plugin)
    args.device = args.device or device.accelerator()
    if args.device is None or (args.device != "cpu" and device.accelerator() != args.device):
        raise SystemExit("no such device here; --tiny --device cpu tries the script")
    nproc = args.nproc or (device.count() if args.device != "cpu" else 1)
    if args.check:
        check(args.device, nproc, args.folder, args.plugin, args.out)
        return
    scratch = tempfile.mkdtemp(prefix="offload-gpu-", dir=args.folder)
    sizes = {"shape": args.shape, "rows": args.rows, "length": args.length, "accumulate": args.accumulate}
    sizes |= {"steps": args.steps, "loops": args.loops}
    if args.tiny:
        sizes = {"shape": "tiny", "rows": 2, "length": 32, "accumulate": args.accumulate, "steps": 2, "loops": 2}
    job = Job(**sizes, device=args.device, folder=scratch)
    keys = args.arms.split(",") if args.arms else [a.key for a in ARMS]
    unknown = set(keys) - {a.key for a in ARMS}
    if unknown:
        raise SystemExit(f"no such arm: {', '.join(sorted(unknown))}")
    run = head(["deepspeed"])
    if importlib.util.find_spec("deepspeed") is None:
        skipped = [key for key in keys if key.startswith("ds")]
        keys = [key for key in keys if key not in skipped]
        run["notes"] += [f"{', '.join(skipped)} skipped: deepspeed is not installed"] if skipped else []
    if job.accumulate > 1:
        skipped = [key for key in keys if key.endswith("-backward")]
        keys = [key for key in keys if key not in skipped]
        if skipped:
            run["notes"].append(f"{', '.join(skipped)} skipped: they would update after every micro-batch")
    print(
        f"{SHAPES[job.shape].parameters / 1e9:.2f} B parameters, {job.tokens} tokens per step and rank, {nproc} rank(s)"
    )
    print("\n".join(f"note: {n}" for n in run["notes"]))
    name = "gpu-tiny" if args.tiny else f"gpu-{args.shape}-{nproc}x"

    def keep(arms: dict[str, Any], notes: list[str]) -> None:
        stuck = [key for key, arm in arms.items() if not arm["last_loss"] < arm["first_loss"]]
        more = [*notes, *(f"the loss of {key} did not fall" for key in stuck)]
        result = {
            **run, "notes": run["notes"] + more, **sizes, "device": args.device, "ranks": nproc,
            "parameters": SHAPES[job.shape].parameters, "tokens_per_step": nproc * job.tokens,
            "labels": {a.key: a.label for a in ARMS if a.key in arms}, "arms": arms, "verdict": verdict(arms),
        }  # fmt: skip
        save(result, args.out / f"{name}.json")

    try:
        arms, notes = run_arms(keys, job, nproc, args.repeats, args.plugin, keep)
        keep(arms, notes)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    for ratio, entry in verdict(arms).items():
        print(f"{ratio}: {entry['ratio']:.2f} (reach: {entry['reach']})")
    try:
        import offload_plot
    except ImportError as error:
        print(f"no picture: {error.name} is not installed; later: python benchmarks/offload.py plot --out {args.out}")
        return
    offload_plot.draw_all(args.out)


if __name__ == "__main__":
    main()
