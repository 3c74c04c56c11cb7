"""Names in checkpoints are those of plain PyTorch: runs with and without wrappers around modules agree about them."""

from __future__ import annotations

from unittest import mock

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import shardwise
from models import adamw, assert_same, make, step
from ranks import run
from shardwise import checkpoint
from shardwise.checkpoint import model_state
from shardwise.errors import CheckpointError
from shardwise.naming import clean_name, clean_names
from slowly import slow

WRAPPERS = {
    "none": lambda module: module,
    "checkpoint_wrapper": checkpoint_wrapper,
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "both": lambda module: torch.compile(checkpoint_wrapper(module), backend="eager"),
}


def build(strategy, kind, seed=0, **kw):
    """A model whose blocks, and one module that is no unit of its own, are wrapped."""
    model = make(seed=seed, **kw)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = WRAPPERS[kind](block)
    model.norm = WRAPPERS[kind](model.norm)
    if strategy != "none":
        shardwise.fully_shard(model, strategy=strategy)
    return model, adamw(model.parameters())


def crossing(path, strategy, saved_as, loaded_as):
    """A run goes on bitwise the same with other wrappers, and everything is called as without any."""
    plain = make().state_dict()
    model, opt = build(strategy, saved_as)
    for i in range(2):
        step(model, opt, i)
    checkpoint.save(path / "run", models=[model], optimizers=[opt])
    checkpoint.async_save(path / "async", models=[model], optimizers=[opt]).wait()
    checkpoint.save_model(model, path / "model")
    values = checkpoint.full_state_dict(model)
    assert list(values) == list(plain)
    onward = step(model, opt, 2), checkpoint.full_state_dict(model)
    for folder in ("run", "async"):
        other, other_opt = build(strategy, loaded_as, seed=3)
        checkpoint.load(path / folder, models=[other], optimizers=[other_opt])
        assert_same(checkpoint.full_state_dict(other), values)
        assert step(other, other_opt, 2) == onward[0]
        assert_same(checkpoint.full_state_dict(other), onward[1])
    for folder in ("run", "model"):
        other, _ = build(strategy, loaded_as, seed=4)
        found = checkpoint.load_model(other, path / folder)
        assert not (found.missing_keys or found.unexpected_keys or found.mismatched_keys)
        assert_same(checkpoint.full_state_dict(other), values)
    return values


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("both", "zero3"),
        ("checkpoint_wrapper", "ddp"),
        *(slow(*rest) for rest in (("both", "ddp"), ("compiled", "zero3"), ("compiled", "ddp"))),
        slow("checkpoint_wrapper", "zero3"),
    ],
)
def test_runs_with_and_without_wrappers_read_each_others_checkpoints(tmp_path, kind, strategy):
    for world in (1, 2):
        for saved_as, loaded_as in ((kind, "none"), ("none", kind)):
            path = tmp_path / f"{world} {saved_as}"
            values = run(world, crossing, path, strategy, saved_as, loaded_as)[0]
            exported = checkpoint.export(path / "run", path / "exported")
            for folder in (exported, path / "model"):
                assert_same(safetensors.torch.load_file(folder / "model.safetensors"), values)
    index = dcp.FileSystemReader(tmp_path / f"2 {kind}" / "run").read_metadata()
    assert not [name for name in index.state_dict_metadata if clean_name(name) != name]


def saves_old_names(path, strategy, kind):
    model, opt = build(strategy, kind)
    step(model, opt, 0)
    other, other_opt = build(strategy, kind, seed=1)
    step(other, other_opt, 0)
    with mock.patch.object(model_state, "clean_name", lambda name: name):  # as older versions did
        checkpoint.save(path, models=[model, other], optimizers=[opt, other_opt])
    return [checkpoint.full_state_dict(m) for m in (model, other)], [step(model, opt, 1), step(other, other_opt, 1)]


def loads_old_names(path, strategy, kind):
    models, opts = zip(*(build(strategy, kind, seed=seed) for seed in (5, 6)), strict=True)
    checkpoint.load(path, models=models, optimizers=opts)
    values = [checkpoint.full_state_dict(m) for m in models]
    return values, [step(model, opt, 1) for model, opt in zip(models, opts, strict=True)]


@pytest.mark.parametrize("kind", ["checkpoint_wrapper", "compiled"])
def test_checkpoints_with_wrappers_names_in_them_are_read(tmp_path, kind):
    saved = run(2, saves_old_names, tmp_path / "old", "zero3", kind)
    index = dcp.FileSystemReader(tmp_path / "old").read_metadata()
    assert [name for name in index.state_dict_metadata if clean_name(name) != name], "the test tests nothing"
    for loaded_as in ("none", kind):
        for (values, losses), (expected, onward) in zip(
            run(2, loads_old_names, tmp_path / "old", "zero3", loaded_as), saved, strict=True
        ):
            assert losses == onward
            for a, b in zip(values, expected, strict=True):
                assert_same(a, b)
    checkpoint.export(tmp_path / "old", tmp_path / "out", part="model_1")
    assert_same(safetensors.torch.load_file(tmp_path / "out" / "model.safetensors"), saved[0][0][1])


def test_files_of_others_with_wrappers_names_in_them_are_read(tmp_path):
    model, _ = build("none", "compiled")
    state = model.state_dict()
    assert any("_orig_mod" in name for name in state)
    torch.save({"model": state}, tmp_path / "a.pt")
    safetensors.torch.save_file({f"_fsdp_wrapped_module.{k}": v for k, v in state.items()}, tmp_path / "b.safetensors")
    dcp.save({"model": state}, checkpoint_id=tmp_path / "c")
    for name in ("a.pt", "b.safetensors", "c"):
        for kind in WRAPPERS:
            other, _ = build("none", kind, seed=1)
            checkpoint.load_model(other, tmp_path / name)
            assert_same(checkpoint.full_state_dict(other), checkpoint.full_state_dict(model))
        checkpoint.export(tmp_path / name, tmp_path / f"{name} out")
        assert checkpoint.compare(tmp_path / f"{name} out", tmp_path / name).differences == []


def partly_compiled(path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    partly = nn.Sequential(plain[0], torch.compile(plain[1], backend="eager"))
    checkpoint.save_model(partly, path / "safe")
    checkpoint.save_model(partly, path / "bin", safe_serialization=False)
    return plain.state_dict()


def test_a_partly_compiled_model_is_saved_under_its_own_names(tmp_path):
    for world in (1, 2):
        expected = run(world, partly_compiled, tmp_path / str(world))[0]
        assert_same(safetensors.torch.load_file(tmp_path / str(world) / "safe" / "model.safetensors"), expected)
        assert_same(torch.load(tmp_path / str(world) / "bin" / "pytorch_model.bin"), expected)


def test_a_module_and_its_compiled_self_are_one(tmp_path):
    model = nn.ModuleDict({"net": nn.Linear(3, 3)})
    model["fast"] = torch.compile(model["net"], backend="eager")
    checkpoint.save(tmp_path / "a", models=[model])
    other = nn.ModuleDict({"net": nn.Linear(3, 3)})
    other["fast"] = other["net"]
    checkpoint.load(tmp_path / "a", models=[other])
    assert torch.equal(other["net"].weight, model["net"].weight)


class Twice(nn.Module):
    """Has two tensors that plain PyTorch would call the same."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self._orig_mod = nn.Linear(2, 2)


def test_two_tensors_of_one_name_are_refused(tmp_path):
    model = nn.Sequential(Twice())
    with pytest.raises(CheckpointError, match=r"parameter '0\.weight' of model"):
        checkpoint.save(tmp_path / "a", models=[model])
    assert not (tmp_path / "a").exists()


def test_clean_names_of_all_kinds():
    assert clean_name("_orig_mod.a._checkpoint_wrapped_module._fsdp_wrapped_module.b_orig_mod.w") == "a.b_orig_mod.w"
    assert clean_name("optimizer.state.model_1:_orig_mod.w.exp_avg") == "optimizer.state.model_1:w.exp_avg"
    assert clean_name("a._orig_mod") == "a" and clean_name("_orig_mod") == ""
    assert clean_names(["a._orig_mod.w", "a.w", "_orig_mod.b", "b._orig_mod"]) == {
        "a._orig_mod.w": "a._orig_mod.w", "a.w": "a.w", "_orig_mod.b": "b", "b._orig_mod": "b._orig_mod",
    }  # fmt: skip
