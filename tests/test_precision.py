"""bf16 and fp16 compute over fp32 master values, reduce dtypes, and loss scaling."""

from __future__ import annotations

import pytest
import torch

import shardwise
from models import PRESETS, adamw, assert_same, batch, loss_of, make, rank, whole
from ranks import run


def bf16(size: int) -> None:
    results = []
    for preset in PRESETS:
        model, oracle = make(), make()
        shardwise.fully_shard(model, strategy=f"{preset},param_dtype=bf16")
        opts = [adamw(m.parameters()) for m in (model, oracle)]
        seen = []
        model.blocks[1].up.register_forward_hook(lambda m, a, out, seen=seen: seen.append((out.dtype, m.weight.dtype)))
        losses = []
        for step in range(30):
            loss = loss_of(model, batch(step % 3, rank()))
            ref = loss_of(oracle, torch.cat([batch(step % 3, r) for r in range(size)]))
            for part, o in zip((loss, ref), opts, strict=True):
                part.backward()
                o.step()
                o.zero_grad()
            losses.append((loss.item(), ref.item()))
        assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
        weights = whole(model)
        assert all(v.dtype == torch.float32 for v in weights.values()), "master values are fp32"
        # AdamW turns a flipped sign of a tiny gradient into a whole step, so compare what was learned
        assert losses[-1][0] < 0.7 * losses[0][0]
        moved = torch.cat([(weights[k] - v).flatten() for k, v in make().state_dict().items()])
        moved_ref = torch.cat([(whole(oracle)[k] - v).flatten() for k, v in make().state_dict().items()])
        assert torch.nn.functional.cosine_similarity(moved, moved_ref, dim=0) > 0.9
        results.append(weights)
    for other in results[1:]:
        assert_same(other, results[0])


def test_bf16_trains_like_fp32_and_all_strategies_agree():
    run(2, bf16, 2)


def reduce_dtypes(size: int) -> dict[str, int]:
    sent = {}
    for reduce in ("fp32", "bf16"):
        model, oracle = make(), make()
        shardwise.fully_shard(model, strategy=f"zero2,reduce_dtype={reduce}")
        shardwise.reset_stats()
        loss_of(model, batch(0, rank())).backward()
        sent[reduce] = shardwise.stats().comm["reduce"].bytes_sent
        loss_of(oracle, torch.cat([batch(0, r) for r in range(size)])).backward()
        with shardwise.gathered(model, grads=True):
            for p, q in zip(model.parameters(), oracle.parameters(), strict=True):
                if q.grad is not None:
                    assert p.grad.dtype == torch.float32
                    tol = 1e-6 if reduce == "fp32" else 2e-2 * q.grad.abs().max().item() + 1e-6
                    torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=tol)
    return sent


def test_reduce_dtype_halves_the_bytes():
    for sent in run(2, reduce_dtypes, 2):
        assert sent["bf16"] * 2 == sent["fp32"]


def scaled(strategy: str) -> list[float]:
    """One rank overflows in step 2: every rank skips it and halves its scale."""
    model = shardwise.fully_shard(make(), strategy=f"{strategy},param_dtype=fp16")
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    scales = []
    for step in range(5):
        loss = loss_of(model, batch(step, rank()))
        if step == 2 and rank() == 1:
            loss = loss * 1e30
        scaler.scale(loss).backward()
        before = whole(model)
        scaler.unscale_(opt)
        if step != 2:
            shardwise.clip_grad_norm_(model, 0.5, error_if_nonfinite=True)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        same = all(torch.equal(before[k], v) for k, v in whole(model).items())
        assert same == (step == 2)
        scales.append(scaler.get_scale())
    return scales


@pytest.mark.parametrize("strategy", PRESETS)
def test_fp16_skips_overflowed_steps_on_all_ranks_alike(strategy):
    first, second = run(2, scaled, strategy)
    assert first == second == [256.0, 512.0, 256.0, 256.0, 512.0]


def params_keep_their_dtypes() -> None:
    model = make()
    model.blocks[0].bfloat16()
    model.blocks[0].requires_grad_(False)
    shardwise.fully_shard(model, strategy="zero3", units=type(model.blocks[0]))
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    assert dtypes["blocks.0.up.weight"] == torch.bfloat16 and dtypes["blocks.1.up.weight"] == torch.float32


def test_without_param_dtype_every_parameter_keeps_its_own():
    run(2, params_keep_their_dtypes)
