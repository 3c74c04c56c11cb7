"""One rank of the demo: ``python -m shardwise.cli.demo.worker JOB`` under the launcher.

The loop is an ordinary PyTorch loop. What Shardwise adds to it is ``init``, ``fully_shard`` and
``clip_grad_norm_``; the rest of what is called here reads what was measured.
"""

from __future__ import annotations

import json
import math
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file

import shardwise
from shardwise import device
from shardwise.cli.demo.job import Job
from shardwise.cli.demo.model import GPT, SIZES
from shardwise.cli.demo.progress import Progress
from shardwise.engine.build import require_engine
from shardwise.tiers.disk import DiskStore
from shardwise.tiers.probe import probe

STEP_KINDS = ("gather", "reduce")  # what shardwise.expected(model).sent_per_step is about
_DEVICE_ROWS = 16  # times the rows that suit a CPU core


def main(job: Job) -> None:
    world = shardwise.init()
    torch.manual_seed(job.seed)
    shape = SIZES[job.size]
    model = GPT(shape).to(world.device)
    shardwise.fully_shard(model, strategy=job.strategy)

    progress = Progress(shown=world.rank == 0)
    try:
        facts = _train(model, world, job, progress)
        progress.phase("measuring on held-out text")
        facts["bits_per_byte"] = _evaluate(model, world, np.load(Path(job.data) / "heldout.npy"))
        progress.phase("writing a sample")
        facts["sample"] = _sample(model, world, job)
        progress.phase("saving the model")
        facts["model_file"] = _save(model, world, job)
    finally:
        progress.stop()
    facts["strategy"] = job.strategy
    facts["device"] = device.name(world.device)
    if world.rank == 0:
        Path(job.facts).write_text(json.dumps(facts))
    if dist.is_initialized():
        dist.destroy_process_group()


def _train(model: GPT, world: Any, job: Job, progress: Progress) -> dict[str, Any]:
    shape = model.shape
    rows = shape.rows * (_DEVICE_ROWS if world.device.type != "cpu" else 1)
    text = torch.from_numpy(np.load(Path(job.data) / "train.npy"))
    # Each rank draws its own windows of the text; together they are the batch.
    draw = torch.Generator().manual_seed(1_000_003 * job.seed + world.rank)
    span = torch.arange(shape.context + 1)
    optimizer = _optimizer(model)
    measured_step = 1 if job.steps is None or job.steps > 1 else 0  # the second: optimizer state exists by then

    memory: dict[str, int] = {}
    start = time.perf_counter()
    step, counted_from, fraction, slow = 0, 0, 0.0, 0.0
    sent_before, disk_before = _sent(), _disk(model)
    while fraction < 1:
        starts = torch.randint(0, len(text) - shape.context - 1, (rows,), generator=draw)
        ids = text[starts[:, None] + span].to(world.device).long()  # (B, T + 1)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * _schedule(fraction, step)
        begun = time.perf_counter()
        # Metering every tensor slows a step down, so only one is metered.
        with shardwise.memory_meter(model) if step == measured_step else nullcontext() as meter:
            logits = model(ids[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            del logits
            loss.backward()
            shardwise.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if meter is not None:
            memory = {**meter.peak, "total": meter.peak_total}
            slow = time.perf_counter() - begun
        step += 1
        if step == 1 and job.steps != 1:
            # The first step finds out in which order units are used, and gathers one more; count from the second.
            counted_from, sent_before, disk_before = step, _sent(), _disk(model)
        elapsed = time.perf_counter() - start
        used = max(step / job.steps if job.steps else 0.0, elapsed / job.seconds if job.seconds else 0.0)
        # All ranks must stop at the same step, so rank 0's clock counts for everyone.
        loss_sum, fraction = _sum([loss.item(), used if world.rank == 0 else 0.0])
        trained = step * rows * shape.context * world.size
        bits = loss_sum / world.size / math.log(2)
        progress.step(step, bits, trained / max(elapsed - slow, 1e-9), fraction, elapsed)

    sent = {kind: (after - sent_before.get(kind, 0)) / max(step - counted_from, 1) for kind, after in _sent().items()}
    disk = {name: value - disk_before[name] for name, value in _disk(model).items()}
    disks = _gather(disk, world)
    per_rank = _gather(memory, world)
    ddp, own = shardwise.expected(model, "ddp"), shardwise.expected(model)
    states = ("parameters", "gradients", "optimizer", "gather_buffers", "offload_buffers")
    ddp_memory = {state: getattr(ddp, state) for state in states}
    # Activations depend on the batch of a rank, not on the strategy.
    ddp_memory["activations"] = max(m["activations"] for m in per_rank)
    ddp_memory["total"] = sum(ddp_memory.values())
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "trained_bytes": trained,
        "train_seconds": elapsed,
        "bytes_per_second": trained / max(elapsed - slow, 1e-9),
        "memory": {"ranks": per_rank, "ddp": ddp_memory},
        "sent_per_step": {
            "measured": sum(sent.get(kind, 0) for kind in STEP_KINDS),
            "expected": own.sent_per_step,
            "other": {kind: n for kind, n in sent.items() if kind not in STEP_KINDS and n},
        },
        "disk": _speed(disks, step - counted_from, model, world),
    }


def _disk(model: GPT) -> dict[str, float]:
    for unit in require_engine(model).units:
        unit.finish_transfers()  # a step's updates take place during the next forward, and this one may be the last
    return vars(shardwise.stats(model).disk).copy()


def _speed(disks: list[dict[str, float]], steps: int, model: GPT, world: Any) -> dict[str, float] | None:
    """What went to and from the disk per step, all ranks together, and how fast beside a probe of the same disk."""
    read, written = (sum(d[name] for d in disks) for name in ("bytes_read", "bytes_written"))
    if not written:
        return None
    busy, waited = (max(d[name] for d in disks) for name in ("busy_s", "wait_s"))
    home = require_engine(model).units[0].home
    assert home is not None and isinstance(home.disk, DiskStore)
    # One rank measures, with as much as a step moves, while the others wait for its figure.
    most = max(int((read + written) / max(steps, 1)), 32 << 20)
    raw = probe(home.disk.folder.base, min(most, 256 << 20)).mixed if world.rank == 0 else 0.0
    return {
        "read_per_step": read / max(steps, 1),
        "written_per_step": written / max(steps, 1),
        "bytes_per_second": (read + written) / max(busy, 1e-9),
        "probe_bytes_per_second": _sum([raw])[0],
        "busy_seconds": busy,
        "waited_seconds": waited,
        "hidden": max(0.0, 1 - waited / max(busy, 1e-9)),
    }


def _optimizer(model: GPT) -> torch.optim.Optimizer:
    """AdamW. The embedding and the head see few of their rows per step and take a higher rate."""
    blocks = list(model.blocks.parameters())
    inside = {id(p) for p in blocks}
    outside = [p for p in model.parameters() if id(p) not in inside]
    rate = 0.001 * min(1.0, 256 / model.shape.width) ** 0.5  # the wider, the lower
    groups = [
        {"params": blocks, "peak": rate, "weight_decay": 0.1},
        {"params": outside, "peak": 0.01, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95))


def _schedule(fraction: float, step: int) -> float:
    """The part of the peak learning rate: a short warm-up, then full, then down to almost nothing at the end."""
    return min((step + 1) / 10, 1.0, (1 - fraction) / 0.6 + 0.02)


@torch.no_grad()
def _evaluate(model: GPT, world: Any, rows: np.ndarray) -> float:
    """Bits per byte on ``rows`` (windows, T + 1), which the ranks share out. Their number divides evenly."""
    model.eval()
    mine = torch.from_numpy(rows[world.rank :: world.size])
    nats = count = 0.0
    for part in mine.split(8):
        ids = part.to(world.device).long()
        logits = model(ids[:, :-1])
        nats += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        count += ids[:, 1:].numel()
    nats, count = _sum([nats, count])
    return nats / count / math.log(2)


@torch.no_grad()
def _sample(model: GPT, world: Any, job: Job, temperature: float = 0.7) -> str:
    """A continuation of the prompt, byte by byte.

    Every rank runs the same forwards and draws the same bytes, as a split model needs all its ranks. The
    parameters are gathered once for all of them.
    """
    model.eval()
    draw = torch.Generator().manual_seed(job.seed)
    before = b"\n\n\n"  # the prompt begins a line
    ids = list(before + job.prompt.encode())
    with shardwise.gathered(model):
        for _ in range(job.sample_bytes):
            seen = torch.tensor([ids[-model.shape.context :]], device=world.device)
            logits = model(seen)[0, -1].float().cpu() / temperature
            ids.append(int(torch.multinomial(logits.softmax(0), 1, generator=draw)))
    return bytes(ids[len(before) :]).decode("utf-8", errors="replace")


def _save(model: GPT, world: Any, job: Job) -> str:
    """The whole model under its plain names, by rank 0. Any PyTorch program can load the file."""
    path = Path(job.out) / "model.safetensors"
    state = model.state_dict()  # a collective: every rank gives its part
    if world.rank == 0:
        # Clones, since views of one buffer cannot be saved as they are.
        whole = {name: value.detach().cpu().clone() for name, value in state.items()}
        save_file(whole, path, metadata={"format": "pt", "size": job.size})
    return str(path)


def _sent() -> dict[str, int]:
    return {kind: count.bytes_sent for kind, count in shardwise.stats().comm.items()}


def _sum(values: list[float]) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def _gather(value: Any, world: Any) -> list[Any]:
    out: list[Any] = [value] * world.size
    if dist.is_initialized():
        dist.all_gather_object(out, value)
    return out


if __name__ == "__main__":
    main(Job.read(Path(sys.argv[1])))
