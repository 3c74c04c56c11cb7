"""Before figures: does every home on this device train as plain torch on the CPU does?"""

from __future__ import annotations

from pathlib import Path

import torch

import ranks
from gpu_arms import HOMES
from llama import SHAPES, Llama, loss_of
from report import head, save
from shardwise import device

STEPS = 4
TOLERANCES = {"": 1e-3, ",param_dtype=bf16": 8e-2}  # norm of the difference over that of the change training made
LEARNING_RATE = 3e-3


def _model() -> Llama:
    torch.manual_seed(0)
    return Llama(SHAPES["tiny"])


def _ids(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(0, SHAPES["tiny"].vocab, (2, 33), generator=generator)


def _adamw(model: Llama) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=1e-3, fused=True)  # eps: no sign flips near 0


def _norm(tensors: list[torch.Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.cat([t.flatten() for t in tensors])))


def compared(rank: int, kind: str, strategy: str) -> tuple[float, float]:
    """Norms of the weights' difference to the reference's after some steps, and of the reference's change."""
    import shardwise

    torch.set_float32_matmul_precision("highest")
    world = shardwise.init(kind)
    reference = _model()
    before = [p.detach().clone() for p in reference.parameters()]
    model = shardwise.fully_shard(_model().to(world.device), strategy=strategy)
    optimizers = [_adamw(reference), _adamw(model)]
    shardwise.attach(optimizers[1])  # what updates in backward wants to know it before
    for step in range(STEPS):
        data = [_ids(step, r) for r in range(world.size)]
        loss_of(reference, torch.cat(data)).backward()
        loss_of(model, data[rank].to(world.device)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with shardwise.gathered(model), torch.no_grad():
        now = [p.detach().cpu().float() for p in reference.parameters()]
        difference = _norm([p.detach().cpu().float() - b for p, b in zip(model.parameters(), now, strict=True)])
    change = _norm([a - b for a, b in zip(now, before, strict=True)])
    return difference, change


def both(rank: int, kind: str, strategy: str) -> dict[str, tuple[float, float]]:
    """:func:`compared` in fp32 and in bf16: starting a rank costs more than training in it."""
    return {low: compared(rank, kind, strategy + low) for low in TOLERANCES}


def check(kind: str, nproc: int, folder: Path, plugin: str | None, out: Path) -> None:
    """Every home, in fp32 and in bf16. The findings go to ``gpu-check.json``, one by one.

    Raises:
        SystemExit: one differs by more than rounding.
    """
    wrong: list[str] = []
    run, found = head(), {}
    backend = device.backend(torch.device(kind), nproc)
    for key, strategy in HOMES.items():
        full = f"{strategy},nvme_path={folder}"
        by_rank = ranks.run(nproc, both, kind, full, backend=backend, timeout=300, plugin=plugin)
        for low, tolerance in TOLERANCES.items():
            difference, change = (max(r[low][i] for r in by_rank) for i in (0, 1))
            good = difference <= tolerance * change
            print(f"  {key}{low}: {'right' if good else 'WRONG'}; off by {difference / change:.1e} of the change")
            if not good:
                wrong.append(key + low)
            found[key + low] = {"off": difference / change, "tolerance": tolerance, "right": good}
        save({**run, "device": kind, "ranks": nproc, "homes": found}, out / "gpu-check.json")
    if wrong:
        raise SystemExit(f"not the reference's numbers: {', '.join(wrong)}")
