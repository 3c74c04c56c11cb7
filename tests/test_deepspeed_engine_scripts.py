"""Scripts in the shapes that people have: HelloDeepSpeed's loop with resuming, and fine-tuning like OpenRLHF's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import shardwise.deepspeed as deepspeed
from models import assert_close, assert_same, batch, loss_of, make, rank, whole
from ranks import run

HELLO = {
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-2, "warmup_num_steps": 4}},
    "fp16": {"enabled": True, "initial_scale_power": 18, "loss_scale_window": 3},
    "zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}},
    "gradient_clipping": 1.0,
}


def hello(folder, config, last, every=3):
    """Trains up to step ``last``, saves now and then, and goes on from what is there."""
    model = make()
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    start = 0
    if Path(folder, "latest").exists():
        _, client_state = engine.load_checkpoint(load_dir=folder)
        start = client_state["checkpoint_step"] + 1
    losses = []
    for step in range(start, last):
        batch_of_step = {"ids": batch(step, rank()).to(engine.device)}
        loss = loss_of(engine, batch_of_step["ids"])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        if (step + 1) % every == 0:
            engine.save_checkpoint(save_dir=folder, client_state={"checkpoint_step": step})
    return start, losses, engine.cur_scale, engine.get_lr(), engine.skipped_steps, whole(engine.module)


def test_a_loop_like_hellodeepspeeds(tmp_path):
    for stage in (1, 3):
        config = HELLO | {"zero_optimization": HELLO["zero_optimization"] | {"stage": stage}}
        path = tmp_path / f"{stage}.json"
        path.write_text(json.dumps(config))
        straight = run(2, hello, str(tmp_path / f"{stage}a"), str(path), 8)
        run(2, hello, str(tmp_path / f"{stage}b"), str(path), 7)  # ends a step behind the checkpoint of step 6
        resumed = run(2, hello, str(tmp_path / f"{stage}b"), str(path), 8)
        for one, two in zip(straight, resumed, strict=True):
            assert (one[0], two[0]) == (0, 6)
            assert one[1][6:] == two[1]
            assert one[2:5] == two[2:5]
            assert one[4] > 0
            assert_same(one[5], two[5])


def grouped(model, decay):
    plain = ("bias", "norm.weight")
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if not any(end in n for end in plain)], "weight_decay": decay},
        {"params": [p for n, p in named if any(end in n for end in plain)], "weight_decay": 0.0},
    ]


def tuning_config(stage, optimizer=None):
    """What OpenRLHF gives, at its defaults but for sizes and the precision."""
    section = {
        "stage": stage, "offload_param": {"device": "none"},
        "offload_optimizer": {"device": "none", "pin_memory": True},
        "sub_group_size": "auto", "stage3_max_live_parameters": "auto", "stage3_max_reuse_distance": "auto",
        "stage3_param_persistence_threshold": "auto", "stage3_prefetch_bucket_size": "auto",
        "reduce_bucket_size": "auto", "zero_hpz_partition_size": 1, "zero_quantized_weights": False,
        "zero_quantized_gradients": False,
    }  # fmt: skip
    config = {
        "steps_per_print": 100, "zero_optimization": section, "bf16": {"enabled": False}, "fp16": {"enabled": False},
        "gradient_clipping": 1.0, "prescale_gradients": False, "wall_clock_breakdown": False,
        "data_types": {"grad_accum_dtype": None}, "checkpoint": {"load_universal": False},
        "compile": {"deepcompile": False}, "tensor_parallel": {"autotp_size": 1},
        "train_micro_batch_size_per_gpu": 2, "train_batch_size": 8,
    }  # fmt: skip
    return config | ({} if optimizer is None else {"optimizer": optimizer})


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)


class Actor(nn.Module):
    """Holds the engine in the place of its model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids)


def tuning(stage):
    settings = {"type": "AdamW", "params": {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}}
    actor, reference = Actor(make()), Actor(make(seed=3))
    engine, optimizer, _, scheduler = deepspeed.initialize(
        model=actor.model, optimizer=None, model_parameters=grouped(actor.model, 0.1), lr_scheduler=cosine,
        config=tuning_config(stage, settings), args={"local_rank": rank()}, dist_init_required=True,
    )  # fmt: skip
    actor.model = engine
    frozen, *_ = deepspeed.initialize(
        model=reference.model, args={"local_rank": rank()}, config=tuning_config(3 if stage == 3 else 0),
        dist_init_required=True,
    )  # fmt: skip
    reference.model = frozen
    reference.eval()
    norms = []
    for index in range(8):
        ids = batch(index, rank())
        with torch.no_grad():
            base = reference(ids[:, :-1]).log_softmax(-1)
        logits = actor(ids[:, :-1])
        drift = (logits.log_softmax(-1) - base).pow(2).mean()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) + 0.1 * drift
        engine.backward(loss)
        engine.step()
        if engine.was_step_applied():
            norms.append(engine.get_global_grad_norm())
        if index == 3:
            optimizer.offload_states(device="cpu", pin_memory=False, non_blocking=False)
            engine.empty_partition_cache()
            engine.reload_states(non_blocking=True)
    assert scheduler.last_epoch == 4
    return norms, whole(engine.module)


def tuning_alone():
    model, reference = make(), make(seed=3)
    optimizer = torch.optim.AdamW(grouped(model, 0.1), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    scheduler = cosine(optimizer)
    norms = []
    for step in range(4):
        for index in (2 * step, 2 * step + 1):
            for r in range(2):
                ids = batch(index, r)
                with torch.no_grad():
                    base = reference(ids[:, :-1]).log_softmax(-1)
                logits = model(ids[:, :-1])
                drift = (logits.log_softmax(-1) - base).pow(2).mean()
                loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) + 0.1 * drift
                (loss / 4).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return norms, whole(model)


@pytest.mark.parametrize("stage", [2, 3])
def test_fine_tuning_like_openrlhfs(stage):
    norms, weights = tuning_alone()
    for found in run(2, tuning, stage):
        assert found[0] == pytest.approx(norms, rel=1e-4)
        assert_close(found[1], weights, 2e-5)
