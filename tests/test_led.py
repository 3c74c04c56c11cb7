"""What scripts for Accelerate do on the main process only: the other ranks take part when they are asked to."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import processes
from models import PRESETS, assert_same, rank, whole
from ranks import run
from shardwise import Accelerator, checkpoint
from shardwise.errors import CommError
from slowly import slow

STEPS = 7  # of two epochs of four batches each; so it ends in the middle


def made(strategy, accumulation=1, prepared=True):
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True, strategy=strategy, gradient_accumulation_steps=accumulation)
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    loader = torch.utils.data.DataLoader(torch.randn(24, 6), batch_size=3, shuffle=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer, accelerator.prepare(loader) if prepared else loader


def trained(strategy, save, folder=None, accumulation=1, prepared=True, resume=None):
    """A script's loop; ``save(accelerator, model)`` runs on the main process only, at the end of its third step."""
    accelerator, model, optimizer, loader = made(strategy, accumulation, prepared)
    taken = 0
    if resume is not None:
        accelerator.load_state(resume)
        taken = 3
    while taken < STEPS:
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch).square().mean())
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                taken += 1
                if taken == 3 and resume is None and accelerator.is_main_process:
                    save(accelerator, model)
            if taken == STEPS:
                break
    return accelerator, model


def saves_state(strategy, folder, accumulation):
    accelerator, model = trained(strategy, lambda a, m: a.save_state(f"{folder}/third"), accumulation=accumulation)
    accelerator.end_training()
    end = whole(model)
    _, again = trained(strategy, None, accumulation=accumulation, resume=f"{folder}/third")
    assert_same(whole(again), end)


@pytest.mark.parametrize("strategy", PRESETS)
@pytest.mark.parametrize("accumulation", [1, slow(2)])
def test_a_state_that_the_main_process_saves_is_that_of_all(tmp_path, strategy, accumulation):
    """With each rank's own random numbers and place in the data: the run that goes on has the same bits."""
    run(2, saves_state, strategy, str(tmp_path), accumulation)


def other_calls(strategy, folder):
    kept = {}

    def save(accelerator, model):
        accelerator.async_save_state(f"{folder}/third")
        accelerator.save_model(model, f"{folder}/model")
        kept.update({k: v.clone() for k, v in accelerator.get_state_dict(model).items()})

    accelerator, model = trained(strategy, save, prepared=False)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:  # in front of the end, where no batch follows
        accelerator.save_state(f"{folder}/last")
        assert accelerator.get_state_dict(model).keys() == kept.keys()
    accelerator.end_training()
    for name in ("third", "last"):
        checkpoint.verify(f"{folder}/{name}")
    other = made(strategy)
    other[0].load_state(f"{folder}/last")
    assert_same(whole(other[1]), whole(model))
    third = made(strategy)
    third[0].load_state(f"{folder}/third")
    values = whole(third[1])
    checkpoint.load_model(other[1], f"{folder}/model", progress=False)
    assert_same(whole(other[1]), values)
    if rank() == 0:
        assert_same(kept, values)


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_other_calls_and_loops_without_a_prepared_loader(tmp_path, strategy):
    run(2, other_calls, strategy, str(tmp_path))


def reads_values(strategy, folder, accumulation):
    kept = {}

    def save(accelerator, model):
        around = nn.ModuleDict({"inside": accelerator.unwrap_model(model)})
        kept.update({name.removeprefix("inside."): v.clone() for name, v in around.state_dict().items()})
        torch.save(model.state_dict(), f"{folder}/third.pt")

    accelerator, model = trained(strategy, save, accumulation=accumulation)
    if accelerator.is_main_process:
        last = whole(model)
        assert_same(torch.load(f"{folder}/third.pt"), kept)
    accelerator.end_training()
    all_of_them = whole(model)  # where everybody calls it, as ever
    if accelerator.is_main_process:
        assert_same(all_of_them, last)
        assert any(not torch.equal(last[name], value) for name, value in kept.items())


@pytest.mark.parametrize("strategy", [*PRESETS, "zero2,param_dtype=bf16", "ddp,param_dtype=bf16", "hsdp,shard_size=1"])
def test_the_main_process_reads_the_values_of_all(tmp_path, strategy):
    """As a script does that writes what ``from_pretrained`` reads."""
    run(2, reads_values, strategy, str(tmp_path), 2)


def hooks_read_values(strategy, folder, everywhere):
    """Once in a save by the main process only, whose hook reads there only; once in one that all ranks ask for."""

    def hook(models, weights, output_dir):
        (model,) = models
        if everywhere or rank() == 0:
            torch.save([model.state_dict() for _ in range(2)][1], f"{output_dir}/values_{rank()}.pt")
            weights.clear()

    accelerator, model, optimizer, loader = made(strategy)
    accelerator.register_save_state_pre_hook(hook)
    for taken, batch in enumerate(loader):
        accelerator.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if taken == 1 and accelerator.is_main_process:
            accelerator.save_state(f"{folder}/second")
    accelerator.save_state(f"{folder}/last")
    accelerator.end_training()
    values = whole(model)
    assert_same(torch.load(f"{folder}/last/values_0.pt"), values)
    if everywhere:
        assert_same(torch.load(f"{folder}/last/values_1.pt"), values)
    second = torch.load(f"{folder}/second/values_0.pt")
    assert any(not torch.equal(second[name], value) for name, value in values.items())


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("strategy", ["zero2,param_dtype=bf16", "zero3"])
def test_hooks_of_a_save_read_values_on_the_main_process_or_everywhere(tmp_path, strategy, everywhere):
    """As hooks do that call ``save_pretrained``."""
    run(2, hooks_read_values, strategy, str(tmp_path), everywhere)


def hooks_fail(folder, failing):
    def hook(models, weights, output_dir):
        if rank() == failing:
            raise ValueError("no room")
        models[0].state_dict()

    accelerator, model, *_ = made("zero3")
    handle = accelerator.register_save_state_pre_hook(hook)
    with pytest.raises((CommError, ValueError), match="no room"):
        accelerator.save_state(f"{folder}/bad")
    handle.remove()
    accelerator.save_state(f"{folder}/good")
    whole(model)


def test_a_hook_that_fails_while_the_main_process_reads_values_leaves_nobody_waiting(tmp_path):
    run(2, hooks_fail, str(tmp_path), 1)


def evaluates_alone(folder):
    """No point is passed by what only the main process does."""
    accelerator, model, optimizer, loader = made("ddp")
    inner, others = accelerator.unwrap_model(model), torch.utils.data.DataLoader(torch.randn(9, 6), batch_size=3)
    others = accelerator.prepare(others)
    for step, batch in enumerate(loader):
        accelerator.backward(model(batch).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        if accelerator.is_main_process:
            with torch.no_grad():
                for other in others:
                    inner(other)
            if step == 1:
                accelerator.save_state(f"{folder}/second")
    accelerator.wait_for_everyone()
    assert checkpoint.read_manifest(f"{folder}/second").info["step"] == 2


def test_an_evaluation_on_the_main_process(tmp_path):
    run(2, evaluates_alone, str(tmp_path))


def two_accelerators(folder):
    """Each has points of its own; one that was copied by pickle has them, too."""
    first = made("zero2")
    second = pickle.loads(pickle.dumps(Accelerator(cpu=True, strategy="zero1")))
    second.prepare(nn.Linear(2, 2))
    other = made("zero3")
    for one in (first, other):
        accelerator, model, optimizer, loader = one
        for batch in loader:
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
            for asked, name in ((first[0], "first"), (other[0], "other")):
                if asked.is_main_process:
                    asked.save_state(f"{folder}/{name}")
                asked.wait_for_everyone()
    if second.is_main_process:
        second.save_state(f"{folder}/second")
    second.wait_for_everyone()
    assert {path.name for path in Path(folder).iterdir()} == {"first", "other", "second"}


def test_several_accelerators(tmp_path):
    run(2, two_accelerators, str(tmp_path))


def only_one_loads(folder):
    accelerator, model, optimizer, loader = made("zero2")
    try:
        for batch in loader:
            accelerator.backward(model(batch).square().mean())
            optimizer.step()
            if accelerator.is_main_process:
                accelerator.load_state(folder)
    except CommError as error:
        return str(error)
    return "nothing"


def test_what_cannot_be_asked_for_is_named_at_once(tmp_path):
    for said in run(2, only_one_loads, str(tmp_path)):
        assert "rank 0 came to load_state, rank 1 to the next batch" in said


NOT_ON_THE_MAIN_PROCESS = """
import sys, torch
from shardwise import Accelerator

accelerator = Accelerator(cpu=True, strategy="zero2")
model = accelerator.prepare(torch.nn.Linear(2, 2))
if not accelerator.is_main_process:
    accelerator.save_state(sys.argv[1])
accelerator.wait_for_everyone()
"""


def test_a_save_on_other_ranks_only_is_named_at_once(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(NOT_ON_THE_MAIN_PROCESS)
    ranks = processes.ranks_of_a_script(path, 2, tmp_path / "a")
    for process in ranks:
        processes.keep(process)
    code, _, err = ranks[1].finish()
    assert code == 1 and "rank 1 came to save_state, and rank 0 went on" in err, err
    ranks[0].kill()


LATE = """
import sys, time, torch
from shardwise import Accelerator

accelerator = Accelerator(cpu=True)
model = accelerator.prepare(torch.nn.Linear(1, 1))
accelerator.backward(model(torch.ones(2, 1)).sum())
accelerator.wait_for_everyone()
if not accelerator.is_main_process:
    time.sleep(1.5)
    open(sys.argv[1], "w").write("I come late")
accelerator.end_training()
"""


def test_the_main_process_stays_until_its_last_word_is_heard(tmp_path):
    """A process that ends takes with it what others have not received."""
    path = tmp_path / "script.py"
    path.write_text(LATE)
    for process in processes.ranks_of_a_script(path, 2, tmp_path / "late", whole_end=True):
        code, _, err = process.finish(60)
        assert code == 0, err
    assert (tmp_path / "late").exists()
