"""save_state and load_state of scripts that save models themselves, and that prepare loaders again and again."""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.utils.data import DataLoader, TensorDataset

import shardwise
from models import PRESETS, adamw, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise import Accelerator
from shardwise.errors import CheckpointError
from shardwise.utils import ProjectConfiguration
from slowly import in_turn


def everywhere(size, function, *args):
    return [function(*args)] if size == 1 else run(size, function, *args)


# --- hooks --------------------------------------------------------------------------------------
class Own:
    """Two models and an optimizer of both, with hooks that save and load some of the models."""

    def __init__(self, strategy, seed, popped, where):
        self.accelerator = accelerator = Accelerator(cpu=True, strategy=strategy)
        self.models = [make(seed), make(seed + 1, d=7)]
        optimizer = adamw([p for model in self.models for p in model.parameters()])
        *_, self.optimizer = accelerator.prepare(*self.models, optimizer)

        def save(models, weights, output_dir):
            if where == "rank 0" and not accelerator.is_main_process:
                return
            for i in sorted(popped, reverse=True):
                value = weights.pop(i)
                if accelerator.is_main_process:
                    torch.save(value, Path(output_dir) / f"own{i}.pt")

        def load(models, input_dir):
            for i in sorted(popped, reverse=True):
                models.pop(i).load_state_dict(torch.load(Path(input_dir) / f"own{i}.pt", weights_only=True))

        accelerator.register_save_state_pre_hook(save)
        accelerator.register_load_state_pre_hook(load)

    def train(self, index):
        for model in self.models:
            self.accelerator.backward(loss_of(model, batch(index, rank())))
        self.optimizer.step()
        self.optimizer.zero_grad()

    def values(self):
        return [whole(model) for model in self.models]


def popped_by_hooks(folder, strategy, resumed_strategy, popped, where):
    first = Own(strategy, 0, popped, where)
    first.train(0)
    first.accelerator.save_state(folder)
    first.train(1)
    again = Own(resumed_strategy, 5, popped, where)
    again.accelerator.load_state(folder)
    again.train(1)  # with the momenta that were saved
    for mine, expected in zip(again.values(), first.values(), strict=True):
        assert_same(mine, expected)
    without = Own(strategy, 3, (), where)
    before = without.values()
    with pytest.raises(CheckpointError, match="excluded when it was saved"):
        without.accelerator.load_state(folder)
    for mine, expected in zip(without.values(), before, strict=True):
        assert_same(mine, expected)


@in_turn(preset=PRESETS, where=["everywhere", "rank 0"])
def test_what_a_hook_pops_is_not_ours_and_its_momenta_are(preset, where, tmp_path):
    run(2, popped_by_hooks, tmp_path / "a", preset, preset, (0, 1), where)


@pytest.mark.parametrize("popped", [(0,), (1,)])
@pytest.mark.parametrize("size", [1, 2])
def test_a_hook_pops_one_of_two_models(popped, size, tmp_path):
    everywhere(size, popped_by_hooks, tmp_path / "a", "zero3", "zero1", popped, "rank 0")
    stored = {name.split(".")[0] for name in FileSystemReader(tmp_path / "a").read_metadata().state_dict_metadata}
    assert stored == {"optimizer", "model" if popped == (1,) else "model_1"}
    assert f"own{popped[0]}.pt" in shardwise.checkpoint.read_manifest(tmp_path / "a").files


def bad_hooks(folder):
    accelerator = Accelerator(cpu=True, strategy="zero2")
    accelerator.prepare(make(0), make(1, d=5))
    accelerator.save_state(folder / "good")

    def only_here(models, weights, output_dir):
        if rank() == 0:
            raise ValueError("no room")

    def changes(models, weights, output_dir):
        if rank() == 0:
            del weights[0]["head.weight"]

    def replaces(models, weights, output_dir):
        weights[0] = {}

    told = []
    for hook in (only_here, changes, replaces):
        handle = accelerator.register_save_state_pre_hook(hook)
        with pytest.raises((CheckpointError, ValueError)) as caught:
            accelerator.save_state(folder / "bad")
        told.append(str(caught.value))
        handle.remove()
    handle = accelerator.register_load_state_pre_hook(lambda models, folder: models.pop() if rank() == 0 else None)
    with pytest.raises(CheckpointError) as caught:
        accelerator.load_state(folder / "good")
    handle.remove()
    told.append(str(caught.value))
    accelerator.load_state(folder / "good")
    accelerator.save_state(folder / "good")
    return told


def test_a_hook_that_fails_or_changes_weights_fails_on_every_rank(tmp_path):
    for told in run(2, bad_hooks, tmp_path):
        assert "no room" in told[0]
        assert "changed the weights" in told[1] and "changed the weights" in told[2]
        assert "removed models [] on rank 1" in told[3]
    assert not (tmp_path / "bad").exists()


# --- loaders ------------------------------------------------------------------------------------
def data(length=12):
    return TensorDataset(torch.arange(float(length)))


def evaluated(folder, keeps, at):
    """A script that prepares a loader in every evaluation, and is resumed before its first one."""

    def begin():
        accelerator = Accelerator(cpu=True, strategy="zero2")
        model = make(0)
        loader = DataLoader(data(), batch_size=1, shuffle=True)
        model, _optimizer, loader = accelerator.prepare(model, adamw(model.parameters()), loader)
        return accelerator, loader

    def evaluate(accelerator, kept):
        loader = accelerator.prepare(DataLoader(data(5), batch_size=1))
        kept[:] = [loader] if keeps else []
        for _ in loader:
            if at == "left early":
                break

    accelerator, loader = begin()
    kept = []
    seen = []
    for (x,) in loader:
        seen += x.tolist()
        evaluate(accelerator, kept)
        if len(seen) == 2:
            accelerator.save_state(folder)
    gc.collect()
    assert len(accelerator._dataloaders) == 1 + keeps
    again, loader = begin()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again.load_state(folder)
    said = any("dataloader 1 (a TensorDataset of 5 samples)" in str(w.message) for w in caught)
    assert said == (keeps and at == "left early" and rank() == 0)
    assert [v for (x,) in loader for v in x.tolist()] == seen[2:]


@pytest.mark.parametrize(("keeps", "at"), [(False, "end"), (True, "end"), (True, "left early")])
@pytest.mark.parametrize("size", [1, 2])
def test_loaders_of_evaluations_do_not_stand_in_the_way_of_a_resume(keeps, at, size, tmp_path):
    everywhere(size, evaluated, tmp_path / "a", keeps, at)


def other_loaders(folder):
    accelerator = Accelerator(cpu=True)
    first, second = accelerator.prepare(DataLoader(data(), batch_size=1), DataLoader(data(6), batch_size=1))
    for _ in first:
        for _ in second:
            accelerator.save_state(folder)
            break
        break

    def told(*lengths):
        new = Accelerator(cpu=True)
        kept = [new.prepare(DataLoader(data(n), batch_size=1)) for n in lengths]
        with pytest.raises(CheckpointError) as caught:
            new.load_state(folder)
        assert len(kept) == len(new._dataloaders)
        return str(caught.value)

    inner = next(iter(first)), next(iter(second))
    assert inner and told() and "6 samples" in told(12)
    return told(6, 12), told(6, 12, 6)


@pytest.mark.parametrize("size", [1, 2])
def test_a_position_does_not_go_to_another_loader(size, tmp_path):
    for swapped, more in everywhere(size, other_loaders, tmp_path / "a"):
        assert "dataloader 0" in swapped and "a TensorDataset of 6 samples" in swapped
        assert "holds 2 dataloaders, and 3 are prepared here" in more


# --- total_limit --------------------------------------------------------------------------------
def limited(folder, automatic):
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=automatic, total_limit=1)
    accelerator = Accelerator(cpu=True, project_config=project)
    accelerator.prepare(make(0))
    mine = folder / "checkpoints" / "checkpoint_of_mine"
    mine.mkdir(parents=True, exist_ok=True)
    said = []
    for name in ("checkpoint_1", "checkpoint_2"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            accelerator.save_state(folder / name)
        said.append([str(w.message) for w in caught if "save_state" in str(w.message)])
    return said, sorted(str(p.parent.relative_to(folder)) for p in folder.rglob("shardwise.json")), mine.exists()


@pytest.mark.parametrize("size", [1, 2])
def test_total_limit_is_for_automatic_names(size, tmp_path):
    for number, (said, there, mine) in enumerate(everywhere(size, limited, tmp_path / "own", False)):
        assert there == ["checkpoint_1", "checkpoint_2"] and mine, "own folders are the script's to delete"
        assert ["total_limit=1" in " ".join(words) for words in said] == [number == 0, False]
    for number, (said, there, mine) in enumerate(everywhere(size, limited, tmp_path / "automatic", True)):
        assert there == ["checkpoints/checkpoint_1"] and mine
        assert ["automatic_checkpoint_naming" in " ".join(words) for words in said] == [number == 0, False]


def test_a_manifest_is_json(tmp_path):
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(data(), batch_size=1))
    accelerator.save_state(tmp_path / "a")
    body = json.loads((tmp_path / "a" / "shardwise.json").read_text())["shardwise"]
    facts = {"dataset": "TensorDataset", "length": len(loader), "inside": False, "reading": False}
    assert body["info"]["accelerator"]["loaders"] == [facts]
