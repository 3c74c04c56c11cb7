"""Our checkpoints as folders of DeepSpeed and back; the command line; and DeepSpeed itself, where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil

import pytest
import torch
from typer.testing import CliRunner

import deepspeed_folders
import processes
import shardwise
from models import assert_same, batch, loss_of, rank, whole
from ranks import run
from shardwise import checkpoint
from shardwise.checkpoint.formats import open_source
from shardwise.cli import app
from test_deepspeed_checkpoints import (
    build,
    check_state,
    edit,
    expectations,
    failure,
    ours,
    resumes,
    state_by_name,
    trained,
)

SMALL = {"global_steps": 2, "global_samples": 8, "skipped_steps": 1, "client_state": {"mine": {"a": [1, 2.5]}},
         "scheduler": None, "loss_scaler": None}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of two ranks under zero3, and the plain model and optimizer that it is of."""
    root = tmp_path_factory.mktemp("ours")
    run(2, ours, root, SMALL)
    return root / "global_step2", *trained()


@pytest.mark.parametrize(("stage", "ranks", "limit"), [(1, 1, 10**9), (2, 3, 10**9), (3, 2, 10**9), (3, 12, 100)])
def test_export_and_back(tmp_path, saved, stage, ranks, limit):
    path, model, stepper = saved
    kwargs = {"stage": stage, "ranks": ranks, "sub_group_size": limit}
    folder = checkpoint.export_deepspeed(path, tmp_path / "out", **kwargs)
    assert folder == tmp_path / "out" / "global_step2" and (tmp_path / "out" / "latest").read_text() == folder.name
    given = expectations(model, stepper)
    for state, _ in resumes(2, tmp_path / "out", "zero1", given):
        assert state == SMALL
    again = checkpoint.export_deepspeed(folder, tmp_path / "again", stage=4 - stage, ranks=2, tag="x")
    assert checkpoint.compare(again, path).differences == [] and checkpoint.compare(folder, path).differences == []
    check_state(again, state_by_name(model, stepper))


def nest_of(file):
    with deepspeed_folders.classes():
        return torch.load(file, weights_only=False)


def same_kind(a, b, where=""):
    """Two nests with the same keys, classes, shapes and dtypes."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and (a.shape, a.dtype) == (b.shape, b.dtype), where
    elif isinstance(a, dict):
        assert isinstance(b, dict) and list(a) == list(b), (where, list(a), list(b))
        for key, value in a.items():
            same_kind(value, b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            same_kind(x, y, f"{where}.{i}")
    elif not isinstance(a, (bool, int, float, str, type(None))):
        assert type(a).__name__ == type(b).__name__, where
    else:
        assert a == b or {type(a), type(b)} <= {int, float}, (where, a, b)


@pytest.mark.parametrize("stage", [2, 3])
def test_files_are_what_the_other_writer_makes(tmp_path, saved, stage):
    """torch itself reads them, and finds what is written from whole tensors without our layouts."""
    path, model, stepper = saved
    mine = checkpoint.export_deepspeed(path, tmp_path / "a", stage=stage, ranks=3)
    other = deepspeed_folders.write(tmp_path / "b", model, stepper, stage, 3, client=SMALL["client_state"])
    assert sorted(p.name for p in mine.iterdir()) == sorted(p.name for p in other.iterdir())
    for file in sorted(mine.iterdir()):
        a, b = nest_of(file), nest_of(other / file.name)
        a, b = (n["optimizer_state_dict"] if "optim" in file.name else n for n in (a, b))
        for key in sorted(b.keys() & a.keys() - {"ds_config", "loss_scaler", "zero_stage", "base_optimizer_state"}):
            if key == "optimizer_state_dict":
                same_kind(_sorted(b[key]["state"]), _sorted(a[key]["state"]), f"{file.name}: {key}")
            else:
                same_kind(_sorted(b[key]), _sorted(a[key]), f"{file.name}: {key}")


def test_what_cannot_be_exported(tmp_path, saved):
    path, model, _ = saved
    checkpoint.save(tmp_path / "none", models=[model])
    assert "holds 0 optimizers" in failure(checkpoint.export_deepspeed, tmp_path / "none", tmp_path / "out")
    checkpoint.save_model(model, tmp_path / "weights")
    assert "go on" in failure(checkpoint.export_deepspeed, tmp_path / "weights", tmp_path / "out")
    for bad in ({"stage": 0}, {"ranks": 0}, {"dtype": torch.float16}, {"tag": "../x"}):
        failure(checkpoint.export_deepspeed, path, tmp_path / "out", **bad)
    other, stepper = trained()
    stepper.state[stepper.param_groups[0]["params"][1]]["step"] += 1
    checkpoint.save(tmp_path / "uneven", models=[other], optimizers=[stepper])
    assert "'step' of" in failure(checkpoint.export_deepspeed, tmp_path / "uneven", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    checkpoint.export_deepspeed(path, tmp_path / "out", tag="a")
    assert "something is there" in failure(checkpoint.export_deepspeed, path, tmp_path / "out", tag="a")
    assert not list((tmp_path / "out").glob("*tmp*"))


# --- the command line -------------------------------------------------------------------------------------
def call(*words, code=0):
    result = CliRunner().invoke(app, ["checkpoint", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


def test_on_the_command_line(tmp_path, saved):
    path, model, stepper = saved
    scaler = {"cur_scale": 512.0, "dynamic": True}
    root = tmp_path / "run"
    folder = deepspeed_folders.write(root, model, stepper, 3, 2, scaler=scaler, client={"epoch": 3})
    shown = json.loads(call("inspect", root, "--json"))
    facts = {"stage": 3, "world size": 2, "step": 2, "skipped steps": 1, "samples": 8, "client_state": ["epoch"]}
    assert {k: shown[k] for k in facts} == facts
    assert shown["loss scale"] == "512" and shown["optimizer groups"] == "2, lr 0.02"
    rows = {row["name"]: row for row in shown["tensors"]}
    assert sorted(rows["model.embed.weight"]["optimizer_state"]) == ["exp_avg", "exp_avg_sq", "step"]
    assert rows["model.head.weight"]["tied_to"] == "embed.weight" and not rows["model.seen"]["optimizer_state"]
    assert "optimizer state" in call("inspect", folder)
    assert "complete" in call("verify", root)
    call("diff", root, path)
    call("export", path, tmp_path / "out", "--format", "deepspeed", "--stage", 1, "--ranks", 2, "--dtype", "bf16")
    assert len(list((tmp_path / "out" / "global_step2").glob("bf16_zero_pp_rank_*_optim_states.pt"))) == 2
    call("export", root, tmp_path / "bin", "--format", "bin")
    assert_same(torch.load(tmp_path / "bin" / "pytorch_model.bin", weights_only=True), whole(model))
    shutil.copytree(folder, root / "global_step4")
    edit(root / "global_step4", "*model*", global_steps=4)
    found = json.loads(call("inspect", root, "--json"))["checkpoints"]
    assert [one["step"] for one in found] == [2, 4]
    victim = next((root / "global_step4").glob("*rank_1*optim*"))
    victim.write_bytes(victim.read_bytes()[:-300])
    assert "rank_1" in call("verify", root, code=1)


# --- DeepSpeed itself -------------------------------------------------------------------------------------
SCRIPT = """
import os, sys, json
os.environ["DS_ACCELERATOR"] = "cpu"
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
import deepspeed
from deepspeed.utils import logger
logger.setLevel("ERROR")
for name in deepspeed.ops.__compatible_ops__:  # none of its extensions is needed, and none is compiled
    deepspeed.ops.__compatible_ops__[name] = False
from models import batch, loss_of
from test_deepspeed_checkpoints import build

out, words = sys.argv[1], sys.argv[2:]
for word in words:
    how, name = word.split(":")
    model, optimizer = build(2 if how == "write" else 7)
    config = {
        "train_micro_batch_size_per_gpu": 2, "zero_allow_untested_optimizer": True, "steps_per_print": 1 << 30,
        "bf16": {"enabled": "bf16" in name}, "gradient_clipping": 0.5,
        "zero_optimization": {"stage": int(name[0]), "sub_group_size": 300 if "small" in name else 10**9},
        "zero_force_ds_cpu_optimizer": False,
    }
    if "offload" in name:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, lr_scheduler=scheduler)
    first = 0
    if how == "read":
        _, client = engine.load_checkpoint(f"{out}/{name}")
        assert client["mine"] == {"a": [1, 2.5]} and model.seen.tolist() == [0, 2, 4] and model.mean.tolist() == [2, 2]
        first = engine.global_steps
        assert first == 2, first
    losses = []
    for step in range(first, 4):
        loss = loss_of(engine, batch(step, dist.get_rank()))
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
        if how == "write" and step == 1:
            engine.save_checkpoint(f"{out}/{name}", client_state={"mine": {"a": [1, 2.5]}})
    with open(f"{out}/{name}/losses{dist.get_rank()}", "w") as file:
        json.dump(losses[-2:], file)
"""


def by_deepspeed(folder, words):
    (folder / "script.py").write_text(SCRIPT)
    for process in processes.ranks_of_a_script(folder / "script.py", 2, folder, *words):
        code, out, err = process.finish()
        assert code == 0, out + err


def losses_of(folder):
    return [json.loads((folder / f"losses{r}").read_text()) for r in range(2)]


REAL = ["0", "1", "1-bf16", "2-offload", "3", "3-small"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    folder = tmp_path_factory.mktemp("real")
    by_deepspeed(folder, [f"write:{name}" for name in REAL])
    return folder


def goes_on(path, strategy):
    model, optimizer = build(5)
    shardwise.fully_shard(model, strategy=strategy)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    loaded = checkpoint.load(path, models=[model], optimizers=[optimizer])
    assert loaded.state["client_state"] == {"mine": {"a": [1, 2.5]}} and loaded.state["global_steps"] == 2
    scheduler.load_state_dict(loaded.state["scheduler"])
    if not path.is_symlink():
        checkpoint.save(path / "ours" / strategy, models=[model], optimizers=[optimizer], state=loaded.state)
    losses = []
    for index in range(2, 4):
        optimizer.zero_grad()
        loss = loss_of(model, batch(index, rank()))
        losses.append(loss.item())
        loss.backward()
        shardwise.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    return losses


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_going_on_from_deepspeed(written, name, strategy):
    strategy += ",param_dtype=bf16" if "bf16" in name else ""
    found = run(2, goes_on, written / name, strategy)
    expected = losses_of(written / name)
    tolerance = 2e-2 if "bf16" in name else 1e-6
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=tolerance)


def test_deepspeed_goes_on_from_ours(written, tmp_path):
    """From what we saved behind its stage 3, under every stage; the losses are those of the run that never stopped."""
    run(2, goes_on, written / "3", "zero2")
    path = written / "3" / "ours" / "zero2"
    names = {"1": (1, 10**9), "2-offload": (2, 10**9), "3": (3, 10**9), "3-small": (3, 300), "1-bf16": (1, 10**9),
             "3-bf16": (3, 10**9)}  # fmt: skip
    for name, (stage, limit) in names.items():
        dtype = torch.bfloat16 if "bf16" in name else torch.float32
        checkpoint.export_deepspeed(path, tmp_path / name, stage=stage, ranks=2, dtype=dtype, sub_group_size=limit)
    by_deepspeed(tmp_path, [f"read:{name}" for name in names])
    expected = losses_of(written / "3")
    for name in names:
        tolerance = 1e-2 if "bf16" in name else 1e-6
        for mine, theirs in zip(losses_of(tmp_path / name), expected, strict=True):
            assert mine == pytest.approx(theirs, rel=tolerance), name


def test_the_other_writer_writes_as_deepspeed(written, tmp_path):
    """What the tests without DeepSpeed read has the keys, classes, shapes and dtypes of the real thing."""
    for name, stage, limit in (("1", 1, 10**9), ("2-offload", 2, 10**9), ("3", 3, 10**9), ("3-small", 3, 300)):
        model, stepper = trained()
        client = {"mine": {"a": [1, 2.5]}}
        mine = deepspeed_folders.write(tmp_path / name, model, stepper, stage, 2, limit=limit, client=client)
        real = written / name / "global_step2"
        os.environ["DS_ACCELERATOR"] = "cpu"
        assert sorted(p.name for p in mine.iterdir()) == sorted(p.name for p in real.iterdir())
        for file in mine.iterdir():
            a, b = torch.load(file, weights_only=False), torch.load(real / file.name, weights_only=False)
            for key in ("lr_scheduler", "ds_config", "skipped_steps", "global_samples"):
                a.pop(key, None), b.pop(key, None)
            optim = b.get("optimizer_state_dict", {})
            for key in ("param_alignment_paddings", "param_slice_mappings", "clip_grad"):
                optim.pop(key, None), a.get("optimizer_state_dict", {}).pop(key, None)
            for nest in (a, b):
                base = nest.get("optimizer_state_dict", {})
                for group in base.get("base_optimizer_state", base.get("optimizer_state_dict", {})).get(
                    "param_groups", ()
                ):
                    group.pop("lr", None), group.pop("initial_lr", None)
            same_kind(_sorted(a), _sorted(b), f"{name}/{file.name}: ")


def _sorted(nest):
    if isinstance(nest, dict):
        return {key: _sorted(nest[key]) for key in sorted(nest, key=str)}
    return [_sorted(value) for value in nest] if isinstance(nest, list) else nest


def test_sections_have_the_names_of_our_own_checkpoints(written, saved):
    real, own = open_source(written / "1").sections, open_source(saved[0]).sections
    assert real.keys() == own.keys() and all(real[key].keys() == own[key].keys() for key in own)
