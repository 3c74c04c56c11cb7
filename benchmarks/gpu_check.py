"""Before figures: does every home on this device train as plain torch on the CPU does?"""

from __future__ import annotations

from pathlib import Path

import torch

import ranks
from gpu_arms import HOMES
from llama import SHAPES, Llama, loss_of

STEPS = 4
FP32, BF16 = 1e-3, 4e-2  # largest difference over the largest change that training made
LEARNING_RATE = 3e-3


def _model() -> Llama:
    torch.manual_seed(0)
    return Llama(SHAPES["tiny"])


def _ids(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return torch.randint(0, SHAPES["tiny"].vocab, (2, 33), generator=generator)


def _adamw(model: Llama) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=1e-3, fused=True)  # eps: no sign flips near 0


def compared(rank: int, device: str, strategy: str) -> tuple[float, float]:
    """The largest difference of a weight to the reference's after some steps, and the largest change of a weight."""
    import shardwise

    torch.backends.cuda.matmul.allow_tf32 = False
    world = shardwise.init(device)
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
        difference = max(
            float((a.detach().cpu().float() - b).abs().max())
            for a, b in zip(model.parameters(), reference.parameters(), strict=True)
        )
    change = max(float((a - b).abs().max()) for a, b in zip(reference.parameters(), before, strict=True))
    return difference, change


def check(device: str, nproc: int, folder: Path) -> None:
    """Every home, in fp32 and in bf16.

    Raises:
        SystemExit: one differs by more than rounding.
    """
    import shardwise

    wrong = []
    for key, strategy in HOMES.items():
        for low, tolerance in (("", FP32), (",param_dtype=bf16", BF16)):
            full = f"{strategy}{low},nvme_path={folder}"
            try:
                shardwise.Strategy.parse(full).require_available()
            except shardwise.ShardwiseError as error:
                print(f"  {key}{low}: skipped: {' '.join(str(error).split())[:160]}")
                break
            backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
            by_rank = ranks.run(nproc, compared, device, full, backend=backend, timeout=300)
            difference, change = (max(r[i] for r in by_rank) for i in (0, 1))
            good = difference <= tolerance * change
            print(
                f"  {key}{low}: {'right' if good else 'WRONG'}; off by {difference / change:.1e} of the largest change"
            )
            if not good:
                wrong.append(key + low)
    if wrong:
        raise SystemExit(f"not the reference's numbers: {', '.join(wrong)}")
