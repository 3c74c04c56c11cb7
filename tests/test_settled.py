"""One rank without offload: nothing moves, so that nothing is done for a unit in a forward, a backward or a step."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import nn

import shardwise
from models import PRESETS, adamw, assert_same, batch, loss_of, make, whole
from shardwise.engine.unit import unit_of


def step(model: nn.Module, optimizer: torch.optim.Optimizer, k: int, clip: Any) -> torch.Tensor:
    for half in range(2):  # gradients of two micro-batches add up
        loss = loss_of(model, batch(k, half))
        (loss / 2).backward()
    clip(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad(set_to_none=k % 2 == 0)
    return loss.detach()


@pytest.mark.parametrize("strategy", [*PRESETS, "ddp,optimizer_in_backward=true", "ddp,reduce_dtype=bf16"])
def test_only_what_is_settled_has_no_hooks(strategy):
    model = shardwise.fully_shard(make(), strategy=strategy)
    settled = strategy in PRESETS
    for p in model.parameters():
        unit = unit_of(p)
        assert unit is not None and unit.settled == settled
    optimizer = adamw(model.parameters())
    shardwise.attach(optimizer)
    loss_of(model, batch(0, 0)).backward()
    assert all(not block._forward_hooks and not block._forward_pre_hooks for block in model.blocks) == settled
    assert all(not p._backward_hooks and not p._post_accumulate_grad_hooks for p in model.parameters()) == settled


@pytest.mark.parametrize("strategy", PRESETS)
def test_it_is_what_plain_training_does_bit_for_bit(strategy):
    plain, model = make(), shardwise.fully_shard(make(), strategy=strategy)
    ours, theirs = adamw(model.parameters()), adamw(plain.parameters())
    for k in range(4):
        loss = step(model, ours, k, shardwise.clip_grad_norm_)
        assert torch.isfinite(loss)
        # The norm is taken over the same pieces under every strategy, which is another order of sums than torch's.
        step(plain, theirs, k, lambda params, bound: shardwise.clip_grad_norm_(params, bound))
    assert_same(whole(model), whole(plain))


def test_gradients_are_whatever_p_grad_holds():
    plain, model = make(), shardwise.fully_shard(make(), strategy="ddp")
    ours, theirs = adamw(model.parameters()), adamw(plain.parameters())
    for m, optimizer in ((model, ours), (plain, theirs)):
        loss_of(m, batch(0, 0)).backward()
        m.head.weight.grad = torch.ones_like(m.head.weight)  # by hand
        m.embed.weight.grad = None
        with torch.no_grad():
            m.blocks[0].up.weight.grad.mul_(3)
        optimizer.step()
        m.blocks[1].up.weight.data = m.blocks[1].up.weight.data * 2  # other memory
        optimizer.zero_grad()
        loss_of(m, batch(1, 0)).backward()
        m.blocks[2].up.weight.data = m.blocks[2].up.weight.data * 2  # between backward and step
        optimizer.step()
    assert_same(whole(model), whole(plain))
    held = [held for p in model.parameters() if (held := shardwise.engine.state_dict.held(p)) is not None]
    for p, at in zip(model.parameters(), held, strict=True):
        assert all(torch.equal(piece, p.reshape(-1)[lo:hi].view(piece.shape)) for lo, hi, piece in at.pieces)
        flat = at.bucket.flat.tensor
        assert not p.numel() or p.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


def test_live_gradients_are_counted_when_asked_for():
    model = shardwise.fully_shard(make(), strategy="ddp")
    optimizer = adamw(model.parameters())
    nbytes = sum(p.numel() for p in model.parameters()) * 4
    for k in range(2):
        loss_of(model, batch(k, 0)).backward()
        assert shardwise.stats(model).live["gradients"] == nbytes
        optimizer.step()
        optimizer.zero_grad()
        assert shardwise.stats(model).live["gradients"] == 0
    with shardwise.memory_meter(model) as meter:
        loss_of(model, batch(2, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert meter.peak_total >= 0.95 * shardwise.expected(model).states  # which counts padding


def calls(layers: int) -> int:
    """How often one step calls a function of ours."""
    model = shardwise.fully_shard(make(layers=layers), strategy="ddp")
    optimizer = adamw(model.parameters())
    for k in range(3):
        step(model, optimizer, k, lambda *_: None)
    found = 0

    def count(frame: Any, event: str, _arg: object) -> None:
        nonlocal found
        found += event == "call" and "shardwise" in frame.f_code.co_filename.rpartition("src")[2]

    sys.setprofile(count)
    try:
        step(model, optimizer, 4, lambda *_: None)
    finally:
        sys.setprofile(None)
    return found


def test_a_step_costs_next_to_nothing_per_unit():
    assert calls(24) - calls(8) <= 16 * 8
