"""Folders of DeepSpeed, loaded whole: weights, optimizer state, counters and small state, into any strategy."""

from __future__ import annotations

import argparse
import copy
import random
import shutil

import numpy as np
import pytest
import torch

import deepspeed_folders
import shardwise
from models import assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise import checkpoint
from shardwise.checkpoint.formats import open_source
from shardwise.checkpoint.storage_reader import StorageReader
from shardwise.deepspeed.utils import zero_to_fp32
from shardwise.errors import CheckpointError
from slowly import in_turn
from test_load_model import failure


class Ours(torch.optim.Optimizer):
    """Momentum, and a number in every group, as optimizers with kernels of their own count."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "step": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] += 1
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p.add_(m.mul_(0.9).add_(p.grad), alpha=-group["lr"])


shardwise.ELEMENTWISE.add("Ours")
OPTIMIZERS = {
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.02),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.02, momentum=0.9),
    "ours": Ours,
}


def groups_of(model):
    """Matrices, and all others without decay. One parameter is frozen; of DeepSpeed's folders, none is empty."""
    model.blocks[1].norm.weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() > 1]},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]


def build(seed, optimizer="adamw"):
    model = make(seed, tied=True, odd=False)
    model.register_buffer("seen", torch.arange(3) * seed)
    model.register_buffer("mean", torch.full((2,), float(seed)))
    groups = groups_of(model)
    if optimizer == "ours":
        groups[1].pop("weight_decay")
    return model, OPTIMIZERS[optimizer](groups)


def trained(optimizer="adamw"):
    """Two steps of plain PyTorch."""
    model, stepper = build(2, optimizer)
    for index in range(2):
        advance(model, stepper, index)
    return model, stepper


def advance(model, optimizer, index, on=0):
    optimizer.zero_grad()
    loss = loss_of(model, batch(index, on))
    loss.backward()
    optimizer.step()
    return loss.item()


def state_by_name(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: dict(state) for p, state in optimizer.state.items()}


def loads(path, strategy, expected, values, after, optimizer="adamw"):
    """Load, compare with plain PyTorch bit for bit, save, go on for a step and compare again."""
    model, stepper = build(5, optimizer)
    shardwise.fully_shard(model, strategy=strategy)
    loaded = checkpoint.load(path, models=[model], optimizers=[stepper])
    assert not loaded.differences and loaded.rank_state is None
    assert_same(whole(model), expected)
    for group, saved in zip(stepper.param_groups, values, strict=True):
        assert {k: v for k, v in group.items() if k in saved} == saved
    checkpoint.save(path.parent / "ours", models=[model], optimizers=[stepper])
    advance(model, stepper, 2)
    found = whole(model)
    for name, value in after.items():
        assert torch.allclose(found[name], value, atol=1e-6), name
    return loaded.state, loaded.manifest


def check_state(folder, states):
    """What the ranks hold of the optimizer, together."""
    sections = open_source(folder).sections
    found = {section[2]: tensors for section, tensors in sections.items() if section[0] == "optimizer"}
    assert found.keys() == {name for name, state in states.items() if state}
    with StorageReader() as reader:
        for name, state in states.items():
            assert found[name].keys() == state.keys()
            for key, value in state.items():
                assert torch.equal(reader.values(found[name][key]), value.reshape(-1)), (name, key)


def resumes(ranks, path, strategy, given, optimizer="adamw"):
    expected, states, values, after = given
    out = run(ranks, loads, path, strategy, expected, values, after, optimizer)
    check_state(path.parent / "ours", states)
    return out


def expectations(model, stepper):
    """What is to be found, and what another step makes of it."""
    expected = whole(model)
    states = {name: {k: v.clone() for k, v in s.items()} for name, s in state_by_name(model, stepper).items()}
    keys = ("lr", "betas", "eps", "weight_decay", "momentum", "step")
    values = [{k: v for k, v in g.items() if k in keys} for g in stepper.param_groups]
    other, second = build(9, "ours" if isinstance(stepper, Ours) else type(stepper).__name__.lower())
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(stepper.state_dict()))
    advance(other, second, 2)
    return expected, states, values, whole(other)


FORMS = {
    "stage 0": {"stage": 0, "ranks": 2},
    "stage 1": {"stage": 1, "ranks": 2},
    "stage 2 of 5 ranks": {"stage": 2, "ranks": 5},
    "stage 1 of 64 ranks": {"stage": 1, "ranks": 64},
    "stage 1, elastic": {"stage": 1, "ranks": 3, "elastic": True},
    "stage 3": {"stage": 3, "ranks": 2},
    "stage 3 of 3 ranks, in sub-groups": {"stage": 3, "ranks": 3, "limit": 150},
    "universal, from stage 2": {"stage": 2, "ranks": 2, "universal": True},
    "universal, from stage 3": {"stage": 3, "ranks": 2, "universal": True, "limit": 200},
}


INTO = [(1, "zero2"), (2, "zero3"), (3, "zero1")]


@in_turn(form=list(FORMS), into=INTO)
def test_every_kind_of_folder_into_other_ranks_and_strategies(tmp_path, form, into):
    ranks, strategy = into
    model, stepper = trained()
    deepspeed_folders.write(tmp_path / "run", model, stepper, **FORMS[form])
    given = expectations(model, stepper)
    if FORMS[form].get("elastic"):  # such folders have no hyperparameters: those here stay
        given[2][:] = [{}, {}]
    for state, manifest in resumes(ranks, tmp_path / "run", strategy, given):
        assert (state["global_steps"], state["skipped_steps"], state["global_samples"]) == (2, 1, 8)
        assert state["scheduler"] is None and state["loss_scaler"] is None and state["client_state"] == {}
        assert manifest.info["step"] == 2


@pytest.mark.parametrize("strategy", ["ddp", "zero3,offload_optimizer=cpu", "zero2,layout=tensor"])
def test_other_homes_and_layouts(tmp_path, strategy):
    model, stepper = trained()
    folder = deepspeed_folders.write(tmp_path, model, stepper, 3, 3, limit=100)
    resumes(2, folder, strategy, expectations(model, stepper))


def test_state_on_a_disk(tmp_path):
    model, stepper = trained()
    folder = deepspeed_folders.write(tmp_path / "a", model, stepper, 2, 2)
    strategy = f"zero3,offload_optimizer=nvme,offload_params=nvme,nvme_path={tmp_path}"
    resumes(2, folder, strategy, expectations(model, stepper))


@pytest.mark.parametrize("optimizer", ["sgd", "ours"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_any_optimizer(tmp_path, optimizer, stage):
    model, stepper = trained(optimizer)
    deepspeed_folders.write(tmp_path / "run", model, stepper, stage, 2)
    given = expectations(model, stepper)
    resumes(2, tmp_path / "run", "zero3", given, optimizer)


def odd_ones():
    model = make(2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.02)


def loads_odd(path, expected, states):
    model, stepper = odd_ones()
    shardwise.fully_shard(model, strategy="zero3")
    checkpoint.load(path, models=[model], optimizers=None)
    assert_same(whole(model), expected)
    assert not stepper.state_dict()["state"]
    checkpoint.load(path, models=[model], optimizers=[stepper])
    checkpoint.save(path.parent / "ours", models=[model], optimizers=[stepper])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameters_without_a_dimension_and_without_an_element(tmp_path, stage):
    """And there and back again, and without the optimizer."""
    model, stepper = odd_ones()
    for index in range(2):
        advance(model, stepper, index)
    deepspeed_folders.write(tmp_path / "run", model, stepper, stage, 3)
    states = {name: state for name, state in state_by_name(model, stepper).items() if name != "nothing"}
    run(2, loads_odd, tmp_path / "run", whole(model), states)
    check_state(tmp_path / "ours", states)
    again = checkpoint.export_deepspeed(tmp_path / "ours", tmp_path / "again", stage=stage, ranks=3)
    assert checkpoint.compare(again, tmp_path / "run").differences == []
    nest = next(again.glob("*model*"))
    with deepspeed_folders.classes():
        frozen = torch.load(nest, weights_only=False)["frozen_param_shapes"]
    assert dict(frozen) == {"nothing": torch.Size([0, 4])}


def bf16_weights(path, masters):
    model, stepper = build(5)
    shardwise.fully_shard(model, strategy="zero2,param_dtype=bf16")
    checkpoint.load(path, models=[model], optimizers=[stepper])
    found = whole(model)
    for name, value in masters.items():
        same = value.bfloat16().float() if name == "blocks.1.norm.weight" else value
        assert torch.equal(found[name].float(), same.float()), name


@pytest.mark.parametrize(("stage", "masters"), [(0, "whole"), (0, "flat"), (1, None), (3, None)])
def test_weights_are_the_fp32_ones(tmp_path, stage, masters):
    model, stepper = trained()
    deepspeed_folders.write(tmp_path, model, stepper, stage, 2, dtype=torch.bfloat16, masters=masters)
    expected = whole(model)
    run(2, bf16_weights, tmp_path, {k: v for k, v in expected.items() if k != "mean"})


def test_steps_that_are_counted_in_groups_go_to_where_torch_counts(tmp_path):
    model, stepper = trained()
    deepspeed_folders.write(tmp_path / "run", model, stepper, 2, 2, group_step=True)
    resumes(2, tmp_path / "run", "zero2", expectations(model, stepper))


def test_small_state(tmp_path):
    model, stepper = trained()
    scaler = {
        "cur_scale": 4096.0, "cur_iter": 7, "last_overflow_iter": 3, "scale_factor": 2.0, "scale_window": 1000,
        "min_scale": 1.0, "delayed_shift": 2, "cur_hysteresis": 1, "consecutive_hysteresis": False,
        "raise_error_at_min_scale": True, "dynamic": True, "dtype": torch.float16,
    }  # fmt: skip
    client = {
        "epoch": 3, "rng": torch.get_rng_state(), "words": ["a", ("b", {"c": 1.5})], "some": {1, 2},
        "args": argparse.Namespace(lr=0.1, deep=argparse.Namespace(x=1)), "best": np.float64(0.25),
        "numpy": np.arange(6, dtype=np.int16).reshape(2, 3), "where": tmp_path, "z": 1 + 2j,
    }  # fmt: skip
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(stepper, 10).state_dict()
    for stage, masters in ((2, None), (3, None), (0, "flat")):
        path = tmp_path / str(stage)
        deepspeed_folders.write(path, model, stepper, stage, 2, scaler=scaler, client=client, scheduler=scheduler,
                                masters=masters)  # fmt: skip
        other, second = build(4)
        state = checkpoint.load(path, models=[other], optimizers=[second]).state
        assert state["loss_scaler"] == {k: v for k, v in scaler.items() if k != "dtype"}
        assert state["scheduler"] == scheduler
        found = state["client_state"]
        assert torch.equal(found.pop("rng"), client["rng"])
        assert np.array_equal(found.pop("numpy"), client["numpy"])
        assert found == {
            "epoch": 3, "words": ["a", ("b", {"c": 1.5})], "some": {1, 2}, "args": {"lr": 0.1, "deep": {"x": 1}},
            "best": 0.25, "where": str(tmp_path), "z": 1 + 2j,
        }  # fmt: skip
        assert type(found["best"]) is np.float64


def test_what_cannot_be_read_of_a_script_is_said(tmp_path):
    model, stepper = trained()
    deepspeed_folders.write(tmp_path, model, stepper, 2, 1, client={"odd": {"x": torch.device}, "epoch": 1})
    with pytest.warns(UserWarning, match=r"not read: client_state\['odd'\]: it is a class device"):
        loaded = checkpoint.load(tmp_path, models=[model], optimizers=[stepper])
    assert loaded.state["client_state"] == {"epoch": 1}


# --- what is wrong with a folder ------------------------------------------------------------------------
def cut(folder, pattern="*rank_1*optim*"):
    (file,) = folder.glob(pattern)
    file.write_bytes(file.read_bytes()[:-200])


def without(folder, pattern="*rank_1*optim*"):
    for file in folder.glob(pattern):
        file.unlink()


def all_without(folder):
    without(folder, "*optim*")


def no_model(folder):
    without(folder, "*model*")


def other_tag(folder):
    (folder.parent / "latest").write_text("global_step9")


def strange_tag(folder):
    (folder.parent / "latest").write_bytes(b"\xff\0../x")


def edit(folder, pattern, **new):
    for file in folder.glob(pattern):
        with deepspeed_folders.classes():
            nest = torch.load(file, weights_only=False)
            torch.save({**nest, **new}, file)


def newer(folder):
    edit(folder, "*model*", ds_version="1.2.0")


def tensor_parallel(folder):
    edit(folder, "*model*", mp_world_size=2)


def tensor_parallel_files(folder):
    shutil.copy(next(folder.glob("*model*")), folder / "mp_rank_01_model_states.pt")


def pipeline(folder):
    shutil.copy(next(folder.glob("*model*")), folder / "layer_01-model_00-model_states.pt")


def pipeline_degree(folder):
    edit(folder, "*model*", checkpoint_parallel_dimensions={"pp_degree": 2, "tp_degree": 1})


def offloaded_to_a_disk(folder):
    (folder / "offloaded_tensors" / "rank0").mkdir(parents=True)


def experts(folder):
    edit(folder, "*model*", num_experts=[4])


def more_ranks(folder):
    without(folder, "*rank_2*optim*")


def empty_index(folder):
    edit(folder, "*rank_0*optim*", optimizer_state_dict={})


def nothing(folder):
    edit(folder, "*rank_0*optim*", optimizer_state_dict=None)


HARM = [
    (cut, "rank_1"), (without, "rank 1"), (all_without, "optimizer states are missing"), (no_model, "no file of model"),
    (other_tag, "latest"), (strange_tag, "latest"), (newer, "1.2.0"), (tensor_parallel, "tensor parallelism"),
    (tensor_parallel_files, "tensor parallelism"), (pipeline, "pipeline"), (experts, "expert"),
    (pipeline_degree, "pipeline"), (offloaded_to_a_disk, "NVMe"),
    (more_ranks, "written by 3 ranks"), (empty_index, "global_step2"), (nothing, "rank_0"),
]  # fmt: skip


def refuses(root, names):
    model, stepper = build(5)
    shardwise.fully_shard(model, strategy="zero3")
    before, texts = whole(model), []
    for name in names:
        texts.append(failure(checkpoint.load, root / name, models=[model], optimizers=[stepper]))
        assert_same(whole(model), before)
        assert not stepper.state_dict()["state"] and stepper.param_groups[0]["lr"] == 0.02
    advance(model, stepper, 0, rank())  # and nothing keeps it from training
    return texts


def test_bad_folders_are_refused_on_every_rank_before_anything_changes(tmp_path):
    model, stepper = trained()
    for harm, _ in HARM:
        harm(deepspeed_folders.write(tmp_path / harm.__name__, model, stepper, 2, 3))
    names = [harm.__name__ for harm, _ in HARM]
    for texts in run(2, refuses, tmp_path, names):
        for (harm, word), text in zip(HARM, texts, strict=True):
            assert word in text and "fix:" in text, f"{harm.__name__}: {text}"


def other_shapes(root):
    texts = []
    for stage in (0, 2):
        model = make(5, tied=True, odd=False, d=11)
        stepper = torch.optim.AdamW(groups_of(shardwise.fully_shard(model, strategy="zero1")), lr=0.5)
        before = whole(model)
        texts.append(failure(checkpoint.load, root / str(stage), models=[model], optimizers=[stepper]))
        assert_same(whole(model), before)
        assert stepper.param_groups[0]["lr"] == 0.5
    return texts


def test_another_models_checkpoint(tmp_path):
    model, stepper = trained()
    for stage in (0, 2):
        deepspeed_folders.write(tmp_path / str(stage), model, stepper, stage, 2)
    for texts in run(2, other_shapes, tmp_path):
        assert all("shape" in text and "fix:" in text for text in texts)
    one = torch.optim.AdamW(model.parameters())
    text = failure(checkpoint.load, tmp_path / "0", models=[model], optimizers=[one])
    assert "groups of [7, 13] parameters" in text
    text = failure(checkpoint.load, tmp_path / "2", models=[model])
    assert "0 optimizers were given" in text
    loaded = checkpoint.load(tmp_path / "2", models=[build(4)[0]], strict=False)
    assert loaded.differences


def test_damaged_bytes_raise_and_do_nothing_else(tmp_path):
    model, stepper = trained()
    folder = deepspeed_folders.write(tmp_path, model, stepper, 2, 2)
    draw, refused = random.Random(0), 0
    for file in sorted(folder.iterdir()):
        good = file.read_bytes()
        first = good.find(b"\x80\x02")
        for _ in range(60):
            data = bytearray(good)
            data[first + draw.randrange(min(2500, len(data) - first))] = draw.randrange(256)
            file.write_bytes(data)
            other, second = build(4)
            try:
                checkpoint.load(tmp_path, models=[other], optimizers=[second])
            except CheckpointError:
                refused += 1
        file.write_bytes(good)
    assert refused > 60


# --- whole weights --------------------------------------------------------------------------------------
def ours(path, state):
    model, stepper = trained()
    shardwise.fully_shard(model, strategy="zero3")
    checkpoint.save(path / "global_step2", models=[model], optimizers=[stepper], state=state)
    if rank() == 0:
        (path / "latest").write_text("global_step2")


def loads_weights(path, expected):
    model = shardwise.fully_shard(build(5)[0], strategy="zero3")
    assert zero_to_fp32.load_state_dict_from_zero_checkpoint(model, path) is model
    assert_same(whole(model), expected)


@pytest.mark.parametrize("stage", [0, 1, 3, None])
def test_zero_to_fp32(tmp_path, stage):
    model, stepper = trained()
    expected = whole(model)
    root = tmp_path / "run"
    if stage is None:
        root.mkdir()
        run(2, ours, root, {})
    else:
        deepspeed_folders.write(root, model, stepper, stage, 2)
    found = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(root)
    assert_same(found, expected)
    assert found["head.weight"] is found["embed.weight"]
    lazy = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(root, tag="global_step2", lazy_mode=True)
    assert_same({name: value.contiguous() for name, value in lazy.items()}, expected)
    if stage != 0:  # which has no names for what the optimizer has
        some = zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(root, exclude_frozen_parameters=True)
        assert expected.keys() - some.keys() == {"blocks.1.norm.weight"}
    assert_same(whole(zero_to_fp32.load_state_dict_from_zero_checkpoint(build(6)[0], root)), expected)
    run(2, loads_weights, root, expected)
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(root, tmp_path / "bin", max_shard_size="5KB")
    parts = [torch.load(file, weights_only=True) for file in sorted((tmp_path / "bin").glob("pytorch_model-*.bin"))]
    assert len(parts) > 1
    assert_same({name: value for part in parts for name, value in part.items()}, expected)
    zero_to_fp32.convert_zero_checkpoint_to_state_dict(root, tmp_path / "safe", "bfloat16", safe_serialization=True)
    loaded = checkpoint.load_model(build(6)[0], tmp_path / "safe")
    assert loaded.kind == "safetensors" and not loaded.missing_keys
    assert "no complete checkpoint" in failure(zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint, tmp_path / "safe")


def test_a_folder_with_checkpoints_of_both_kinds(tmp_path):
    """As of a run that went on from DeepSpeed's: what ``latest`` names is taken."""
    model, stepper = trained()
    deepspeed_folders.write(tmp_path, model, stepper, 2, 2)
    advance(model, stepper, 2)
    checkpoint.save(tmp_path / "global_step3", models=[model], optimizers=[stepper], info={"step": 3})
    for tag, step in (("global_step3", 3), ("global_step2", 2)):
        (tmp_path / "latest").write_text(tag)
        for path in (tmp_path, tmp_path / "latest"):
            other, second = build(4)
            assert checkpoint.load(path, models=[other], optimizers=[second]).manifest.info["step"] == step
            assert open_source(path).path == tmp_path / tag
            assert checkpoint.load_model(build(4)[0], path).path.is_relative_to(tmp_path)
    (tmp_path / "latest").write_text("global_step9")
    assert "latest" in failure(checkpoint.load, tmp_path, models=[model], optimizers=[stepper])


# --- the Accelerator --------------------------------------------------------------------------------------
def into_an_accelerator(root, expected):
    accelerator = shardwise.Accelerator(strategy="zero2", cpu=True)
    model, stepper = build(5)
    scheduler = torch.optim.lr_scheduler.StepLR(stepper, 1, 0.5)
    model, stepper, scheduler = accelerator.prepare(model, stepper, scheduler)
    assert accelerator.load_state(root)
    assert_same(whole(model), expected)
    assert accelerator.step == 2 and scheduler.scheduler.last_epoch == 2
    assert stepper.optimizer.param_groups[0]["lr"] == 0.02
    damaged = root.parent / "damaged"
    text = failure(accelerator.load_state, damaged)
    assert_same(whole(model), expected)
    return text


@pytest.mark.parametrize("beside", [False, True])
def test_load_state_of_an_accelerator(tmp_path, beside):
    """Alone, and as accelerate saves under DeepSpeed: the scheduler in a file of its own."""
    model, stepper = trained()
    saved = {"last_epoch": 2, "_step_count": 3, "base_lrs": [0.08, 0.08], "_last_lr": [0.02, 0.02]}
    scheduler = None if beside else saved
    for name in ("run", "damaged"):
        folder = deepspeed_folders.write(
            tmp_path / name, model, stepper, 2, 3, tag="pytorch_model", scheduler=scheduler
        )
    without(folder)
    if beside:
        torch.save(saved, tmp_path / "run" / "scheduler.bin")
    for text in run(2, into_an_accelerator, tmp_path / "run", whole(model)):
        assert "rank 1's file of optim states is missing" in text
