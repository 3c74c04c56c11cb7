"""save_checkpoint and load_checkpoint: any stage, any number of ranks, the same run."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

import shardwise.deepspeed as deepspeed
from models import assert_close, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise.errors import CheckpointError, ShardwiseError
from test_deepspeed_engine import adamw, settings


def schedule(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.9**n)


def engine_of(config, seed=0):
    return deepspeed.initialize(model=make(seed), optimizer=adamw, lr_scheduler=schedule, config=config)


def steps(engine, first, last, ranks=2):
    """Each step sees the same samples whatever the number of ranks."""
    gas = engine.gradient_accumulation_steps()
    for index in range(first * gas, last * gas):
        mine = [r for r in range(ranks) if r % engine.world_size == engine.global_rank]
        loss = sum(loss_of(engine.module, batch(index, r)) for r in mine) / len(mine)
        engine.backward(loss)
        engine.step()


FP16 = {"fp16": {"enabled": True, "initial_scale_power": 20, "loss_scale_window": 2, "hysteresis": 1}}


def saves(config, folder, more=2):
    engine, *_ = engine_of(config)
    steps(engine, 0, 3)
    assert engine.save_checkpoint(folder, client_state={"epoch": 7, "seen": torch.arange(3)})
    assert Path(folder, "latest").read_text() == "global_step3"
    if more:
        steps(engine, 3, 3 + more)
    return whole(engine.module), engine.cur_scale, engine.get_lr(), engine.skipped_steps


def resumes(config, folder, tag=None, more=2):
    try:
        engine, *_ = engine_of(config, seed=1)
        path, client = engine.load_checkpoint(folder, tag)
        assert path == str(Path(folder) / "global_step3")
        assert client["epoch"] == 7
        assert client["seen"].tolist() == [0, 1, 2]
        assert (engine.global_steps, engine.global_samples) == (3, 3 * 2 * 2 * 2)
        assert engine.micro_steps == 3 * engine.gradient_accumulation_steps()
        steps(engine, 3, 3 + more)
        return whole(engine.module), engine.cur_scale, engine.get_lr(), engine.skipped_steps
    finally:
        if torch.distributed.get_world_size() == 1:
            deepspeed.comm.destroy_process_group()


def other(stage, world, **more):
    """The same batch on another number of ranks."""
    return settings(stage, 2, 0.5, micro=4 // world, **more)


@pytest.mark.parametrize("saved", [0, 2, 3])
def test_any_stage_and_any_number_of_ranks_go_on(saved, tmp_path):
    (right, scale, rate, skipped), _ = run(2, saves, other(saved, 2), str(tmp_path))
    for stage in range(4):
        for found in run(2, resumes, other(stage, 2), str(tmp_path)):
            assert found[1:] == (scale, rate, skipped)
            assert_close(found[0], right)
            if stage == saved:
                assert_same(found[0], right)
    found = run(1, resumes, other(3, 1), str(tmp_path), "global_step3")[0]
    assert found[2] == rate
    assert_close(found[0], right)


def test_the_loss_scale_goes_on(tmp_path):
    one = run(2, saves, other(2, 2, **FP16), str(tmp_path))[0]
    two = run(2, resumes, other(2, 2, **FP16), str(tmp_path))[0]
    assert one[1:] == two[1:]
    assert one[3] > 0
    assert_same(one[0], two[0])


def offloaded(folder, home, nvme):
    zero = {"stage": 3, "offload_optimizer": {"device": home, "nvme_path": nvme}}
    return other(3, 2, zero_optimization=zero)


def test_what_is_offloaded_goes_on(tmp_path):
    right = run(2, saves, other(3, 2), str(tmp_path / "a"))[0]
    for home in ("cpu", "nvme"):
        config = offloaded(tmp_path, home, str(tmp_path))
        found = run(2, saves, config, str(tmp_path / home))[0]
        assert_same(found[0], right[0])
        assert_same(run(2, resumes, config, str(tmp_path / "a"))[0][0], right[0])
        assert_same(run(2, resumes, other(3, 2), str(tmp_path / home))[0][0], right[0])


def parts(folder):
    """Only what is asked for is loaded."""
    saved, *_ = engine_of(settings(2))
    steps(saved, 0, 2)
    saved.save_checkpoint(folder, "first", save_latest=False)
    weights = whole(saved.module)
    found = []
    for arguments in (
        {"load_module_only": True},
        {"load_optimizer_states": False},
        {"load_lr_scheduler_states": False},
    ):
        engine, optimizer, _, scheduler = engine_of(settings(1), seed=1)
        engine.load_checkpoint(folder, "first", **arguments)
        assert_same(whole(engine.module), weights)
        found.append((engine.global_steps, scheduler.last_epoch, bool(optimizer.state_dict()["state"])))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert engine.load_checkpoint(folder) == (None, None)
    assert (rank() != 0) or any("latest" in str(w.message) for w in said)
    return found


def test_parts_of_a_checkpoint(tmp_path):
    assert run(2, parts, str(tmp_path))[0] == [(0, 0, False), (2, 2, False), (2, 0, True)]


def wrong(folder):
    found = []
    engine, *_ = engine_of(settings(2))
    before = whole(engine.module)
    for call in (
        lambda: engine.load_checkpoint(folder, "no_such_tag"),
        lambda: engine.save_checkpoint(""),
        lambda: engine.save_checkpoint(None),
        lambda: engine.save_checkpoint(folder, client_state={"model": object()}),
        lambda: engine.load_checkpoint(folder, custom_load_fn=print),
    ):
        with pytest.raises(ShardwiseError) as error:
            call()
        found.append(str(error.value))
    assert not Path(folder, "latest").exists()
    engine.save_checkpoint(folder, "good")
    small, *_ = deepspeed.initialize(model=torch.nn.Linear(2, 2), optimizer=adamw, config=settings(2))
    with pytest.raises(CheckpointError, match="does not fit"):
        small.load_checkpoint(folder)
    strict, *_ = engine_of(settings(2, checkpoint={"tag_validation": "Fail"}))
    with pytest.raises(CheckpointError, match="ranks name it differently"):
        strict.save_checkpoint(folder, f"rank{rank()}")
    assert Path(folder, "latest").read_text() == "good"
    assert_same(whole(engine.module), before)
    return found


def test_what_cannot_be_saved_or_loaded(tmp_path):
    for found in run(2, wrong, str(tmp_path)):
        for word, text in zip(
            ("no_such_tag", "save_dir", "save_dir", "client_state", "custom_load_fn"),
            found,
            strict=True,
        ):
            assert word in text, text


def weights_for_others(folder, stage, precision):
    model = make(tied=True)
    model.norm.weight.requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=settings(stage, **precision))
    assert engine.save_16bit_model(folder)
    assert engine.save_16bit_model(folder, "trained.safetensors", exclude_frozen_parameters=True)
    return whole(engine.module)


def test_weights_for_others(tmp_path):
    from safetensors.torch import load_file

    for stage, precision, dtype in ((3, {}, torch.float32), (2, {"bf16": {"enabled": True}}, torch.bfloat16)):
        right = run(2, weights_for_others, str(tmp_path), stage, precision)[0]
        found = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
        assert_same(found, {name: value.to(dtype) for name, value in right.items()})
        trained = load_file(tmp_path / "trained.safetensors")
        assert set(right) - set(trained) == {"norm.weight"}
        assert {value.dtype for value in trained.values()} == {dtype}
        assert not list(tmp_path.glob(".*"))


def adapted(stage, seed):
    """A model with tied weights of which one block trains, and the rest does not."""
    model = make(0, tied=True)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("blocks.1"))
    if seed:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(seed if p.requires_grad else 0)
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw, config=settings(stage, 1, 0.5))
    return engine


def trained_only(folder, stage):
    engine = adapted(stage, 0)
    steps(engine, 0, 2)
    engine.save_checkpoint(folder, exclude_frozen_parameters=True)
    engine.save_checkpoint(folder, "all", save_latest=False)
    steps(engine, 2, 4)
    return whole(engine.module)


def goes_on(folder, stage):
    engine = adapted(stage, 1)
    engine.load_checkpoint(folder)
    steps(engine, 2, 4)
    found = whole(engine.module)
    other, *_ = engine_of(settings(stage, 1, 0.5))  # all of it trains: values are missing
    with pytest.raises(CheckpointError, match=r"embed.weight' is not in the checkpoint"):
        other.load_checkpoint(folder)
    return found


def test_a_checkpoint_without_frozen_parameters(tmp_path):
    for saved, loaded in ((3, 2), (1, 3)):
        (right, _) = run(2, trained_only, str(tmp_path), saved)
        for found in run(2, goes_on, str(tmp_path), loaded):
            assert_same(found, right)
        sizes = [sum(f.stat().st_size for f in (tmp_path / tag).rglob("*")) for tag in ("global_step2", "all")]
        assert sizes[0] < 0.8 * sizes[1]
