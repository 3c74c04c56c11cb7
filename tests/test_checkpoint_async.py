"""Saves in the background: they hold what was there when they began, are whole or not there, and never fail unheard."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import threading
import time
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import processes
import shardwise
from models import PRESETS, adamw, assert_same, batch, loss_of, make, rank, step, whole
from processes import longest_file
from ranks import run
from shardwise import Accelerator, checkpoint
from shardwise.checkpoint.storage_writer import BlockFile
from shardwise.errors import CheckpointError
from shardwise.utils import ProjectConfiguration
from test_offload import separate_memory


def build(strategy, seed=0, **kw):
    model = shardwise.fully_shard(make(seed=seed, **kw), strategy=strategy)
    return model, adamw(model.parameters())


def failure(function, *args, **kw) -> str:
    try:
        function(*args, **kw)
    except (CheckpointError, MemoryError) as error:
        return str(error)
    return ""


# --- what it holds -------------------------------------------------------------------------------
def goes_on_meanwhile(path, strategy):
    model, opt = build(strategy)
    for i in range(2):
        step(model, opt, i)
    saved, counter = whole(model), {"n": torch.tensor(1)}
    handle = checkpoint.async_save(path, models=[model], optimizers=[opt], state=counter)
    counter["n"] += 1
    straight = [step(model, opt, i) for i in (2, 3)], whole(model)
    assert handle.wait() == path and handle.done

    other, other_opt = build(strategy, seed=3)
    loaded = checkpoint.load(path, models=[other], optimizers=[other_opt])
    assert loaded.state["n"] == 1
    assert_same(whole(other), saved)
    assert ([step(other, other_opt, i) for i in (2, 3)]) == straight[0]
    assert_same(whole(other), straight[1])


@pytest.mark.parametrize("strategy", [*PRESETS, "zero2,param_dtype=bf16"])
def test_it_holds_what_was_there_when_it_began(tmp_path, strategy):
    run(2, goes_on_meanwhile, tmp_path / "a", strategy)


class Held:
    """Holds back what is copied in the background: it begins when told, and is slow. Or it fails there."""

    def __init__(self, fails=False):
        self.fails, self.go, self.copied, self._put = fails, threading.Event(), 0, BlockFile.put

    def __enter__(self):
        def put(file, tensor):
            if threading.current_thread() is not threading.main_thread():
                self.go.wait()
                time.sleep(0.003)
                if self.fails:
                    raise MemoryError("no room for the copy")
                self.copied += 1
            self._put(file, tensor)

        BlockFile.put = put
        return self

    def __exit__(self, *_):
        self.go.set()
        BlockFile.put = self._put


IN_BACKWARD = "optimizer_in_backward=true"


def goes_on_at_once(path, strategy, separate=False):
    """The next update comes while the copy is under way."""

    def build(seed):
        model = make(seed=seed)
        if strategy != "plain":
            with separate_memory() if separate else nullcontext():
                shardwise.fully_shard(model, strategy=strategy)
        opt = adamw(model.parameters())
        shardwise.attach(opt)
        return model, opt

    model, opt = build(0)
    for i in range(2):
        step(model, opt, i)
    with Held() as held:
        handle = checkpoint.async_save(path, models=[model], optimizers=[opt])
        loss = loss_of(model, batch(2, rank()))
        if IN_BACKWARD in strategy:
            held.go.set()
            loss.backward()
        else:  # neither forward nor backward wait
            loss.backward()
            assert not handle.done and not held.copied
            held.go.set()
            opt.step()
        waited_for = held.copied
        handle.wait()
    assert 0 < waited_for == held.copied
    if IN_BACKWARD in strategy:
        opt.step()
    opt.zero_grad()
    losses = [loss.item(), step(model, opt, 3)]

    other, other_opt = build(3)
    checkpoint.load(path, models=[other], optimizers=[other_opt])
    assert [step(other, other_opt, i) for i in (2, 3)] == losses
    assert_same(whole(other), whole(model))


@pytest.mark.parametrize("strategy", [*PRESETS, "zero3,offload_optimizer=cpu", f"zero2,{IN_BACKWARD}"])
def test_an_update_waits_for_the_copy(tmp_path, strategy):
    run(2, goes_on_at_once, tmp_path / "a", strategy)


def test_so_do_later_updates_and_other_optimizers(tmp_path):
    run(2, goes_on_at_once, tmp_path / "a", "zero3,offload_optimizer=cpu,offload_overlap=true", True)
    run(1, goes_on_at_once, tmp_path / "b", "plain")


def first_state(opt):
    return next(iter(opt.state.values()))["exp_avg"]


def by_hand(folder):
    """State is changed by others than a step."""
    model, opt = build("zero3")
    step(model, opt, 0)
    things = {"models": [model], "optimizers": [opt]}
    texts = []
    for i in range(3):
        with Held() as held:
            handle = checkpoint.async_save(folder / f"checkpoint_{i}", **things)
            if i == 0:  # and nobody waited
                if rank() == 1:
                    first_state(opt).add_(1)
            elif i == 1:
                held.go.set()
                with shardwise.optimizer_state(opt):
                    first_state(opt).add_(1)
            else:
                held.go.set()
                handle.wait_for_copy()
                first_state(opt).add_(1)
            held.go.set()
            texts.append(failure(handle.wait))
    return texts


def test_state_that_somebody_else_changes_is_noticed(tmp_path):
    for r, texts in enumerate(run(2, by_hand, tmp_path)):
        assert "was changed while it was being copied" in texts[0] and "exp_avg" in texts[0], texts
        assert ("rank 1" in texts[0]) == (r == 0)
        assert texts[1:] == ["", ""]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_1", "checkpoint_2"]


def copy_fails(path):
    model, opt = build("zero2")
    step(model, opt, 0)
    with Held(fails=rank() == 1) as held:
        handle = checkpoint.async_save(path, models=[model], optimizers=[opt])
        held.go.set()
        step(model, opt, 1)
        text = failure(handle.wait)
    step(model, opt, 2)
    checkpoint.async_save(path, models=[model], optimizers=[opt]).wait()
    return text


def test_a_copy_that_fails_holds_nobody_up(tmp_path):
    for text in run(2, copy_fails, tmp_path / "a"):
        assert "no room for the copy" in text
    assert os.listdir(tmp_path) == ["a"]


def lets_go(folder):
    """When a save is written it keeps nothing of what it copied; plans of other models do not mix."""
    for i, strategy in enumerate(["zero3", "ddp", "zero3"]):
        model, opt = build(strategy)
        step(model, opt, 0)
        handle = checkpoint.async_save(folder / str(i), models=[model], optimizers=[opt])
        handle.wait()
        seen = [weakref.ref(model), weakref.ref(first_state(opt))]
        expected = whole(model)
        del model, opt
        gc.collect()
        assert [ref() for ref in seen] == [None, None]
        other, _ = build("zero2", seed=4)
        checkpoint.load(folder / str(i), models=[other], strict=False)
        assert_same(whole(other), expected)


def test_it_lets_go_of_what_it_saved(tmp_path):
    run(2, lets_go, tmp_path)


def weights_at_once(folder):
    model, opt = build("zero3")
    step(model, opt, 0)
    checkpoint.async_save(folder / "checkpoint_0", models=[model], optimizers=[opt])
    other, _ = build("zero1", seed=3)
    assert checkpoint.load_model(other, folder / "latest").path == folder / "checkpoint_0"
    assert_same(whole(other), whole(model))


def test_load_model_waits_for_it(tmp_path):
    run(2, weights_at_once, tmp_path)


def test_state_at_home_on_a_disk(tmp_path):
    run(2, goes_on_meanwhile, tmp_path / "a", f"zero3,offload_optimizer=nvme,nvme_path={tmp_path}")


def one_after_the_other(folder):
    """Saves queue up; the memory for the copies is used again."""
    model, opt = build("zero3", d=64, odd=False)
    handles, values = [], []
    for i in range(4):
        values.append(whole(model))
        handles.append(checkpoint.async_save(folder / f"checkpoint_{i}", models=[model], optimizers=[opt]))
        assert all(h.done for h in handles[:-1])
        step(model, opt, i)
    checkpoint.save(folder / "checkpoint_4", models=[model], optimizers=[opt])
    assert handles[-1].done
    for i, expected in enumerate(values):
        other, _ = build("zero3", seed=9, d=64, odd=False)
        checkpoint.load(folder / f"checkpoint_{i}", models=[other], strict=False)
        assert_same(whole(other), expected)


def test_one_after_the_other(tmp_path):
    run(2, one_after_the_other, tmp_path)


def automatic(folder):
    project = ProjectConfiguration(str(folder), automatic_checkpoint_naming=True, total_limit=2)
    accelerator = Accelerator(cpu=True, strategy="zero2", project_config=project)
    model = make()
    model, opt = accelerator.prepare(model, adamw(model.parameters()))
    values = []
    for i in range(4):
        accelerator.backward(loss_of(model, batch(i, rank())))
        opt.step()
        opt.zero_grad()
        handle = accelerator.async_save_state()
        values.append(whole(model))
    assert accelerator.has_checkpoint() and handle.done
    accelerator.load_state("latest")
    assert_same(whole(model), values[-1])
    accelerator.load_state(folder / "checkpoints" / "checkpoint_2")
    assert_same(whole(model), values[-2])
    accelerator.async_save_state()
    accelerator.end_training()
    return sorted(os.listdir(folder / "checkpoints"))


def test_an_accelerators_saves_with_a_limit(tmp_path):
    for names in run(2, automatic, tmp_path):
        assert names == ["checkpoint_3", "checkpoint_4"]


# --- what goes wrong -----------------------------------------------------------------------------
def fails_on_one_rank(folder, heard_at):
    """The write of rank 1 fails after everybody has gone on."""
    model, opt = build("zero3", d=64, odd=False)
    checkpoint.save(folder / "checkpoint_0", models=[model], optimizers=[opt], state={"n": 0})
    kept = whole(model)
    with longest_file(30_000 if rank() == 1 else resource.RLIM_INFINITY):
        handle = checkpoint.async_save(folder / "checkpoint_1", models=[model], optimizers=[opt], state={"n": 1})
        step(model, opt, 0)
        while not handle.done:
            time.sleep(0.01)
    if heard_at == "wait":
        text = failure(handle.wait)
    elif heard_at == "save":
        text = failure(checkpoint.save, folder / "checkpoint_2", models=[model])
    elif heard_at == "load":
        text = failure(checkpoint.load, folder / "checkpoint_0", models=[model])
    elif heard_at == "one rank's wait":
        text = failure(handle.wait) if rank() == 0 else ""
        if rank() == 1:
            text = failure(checkpoint.async_save, folder / "checkpoint_2", models=[model])
        else:
            assert "rank 1" in failure(checkpoint.async_save, folder / "checkpoint_2", models=[model])
    else:
        text = failure(Accelerator(cpu=True).end_training)
    # everybody can go on, and the older one is whole
    loaded = checkpoint.load(folder / "latest", models=[model], optimizers=[opt])
    assert loaded.state == {"n": 0}
    assert_same(whole(model), kept)
    checkpoint.async_save(folder / "checkpoint_1", models=[model], state={"n": 1}).wait()
    return text


@pytest.mark.parametrize("heard_at", ["wait", "save", "load", "one rank's wait", "end of training"])
def test_a_failed_write_is_heard_of_on_every_rank(tmp_path, heard_at):
    first, second = run(2, fails_on_one_rank, tmp_path, heard_at)
    for text in (first, second):
        assert "File too large" in text and "__1_0.distcp" in text, text
    assert "rank 1" in first
    assert sorted(os.listdir(tmp_path)) == ["checkpoint_0", "checkpoint_1"]


def refused_at_once(path):
    model = make()
    texts = [
        failure(checkpoint.async_save, path, models=[model], state={"f": print}),
        failure(checkpoint.async_save, path, models=[model], total_limit=0),
        failure(checkpoint.async_save, path / "state.pt" / "x" if rank() else path, models=[model, model]),
    ]
    checkpoint.async_save(path, models=[model]).wait()
    return texts


def test_what_is_wrong_from_the_beginning_is_said_at_once(tmp_path):
    for texts in run(2, refused_at_once, tmp_path / "a"):
        assert "state['f']" in texts[0] and "total_limit=0" in texts[1] and "given twice" in texts[2]
    assert os.listdir(tmp_path) == ["a"]


def fill_the_disk(pipe, folder):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) or libc.mount(b"none", b"/", None, 0x44000, None):
        return pipe.send("may not")
    if libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, b"size=3m"):
        return pipe.send("may not")
    small, large = torch.nn.Linear(64, 64), torch.nn.Linear(1000, 1000)
    checkpoint.save(folder / "checkpoint_0", models=[small], state={"n": 0})
    texts = [failure(checkpoint.save, folder / f"checkpoint_{i}", models=[large], state={"n": i}) for i in (0, 1)]
    texts.append(failure(checkpoint.async_save(folder / "checkpoint_1", models=[large]).wait))
    loaded = checkpoint.load(folder / "latest", models=[torch.nn.Linear(64, 64)])
    return pipe.send((texts, loaded.state, os.listdir(folder)))


def test_a_full_disk(tmp_path):
    process, pipe = processes.fork(fill_the_disk, tmp_path, connected=True)
    assert pipe.poll(60), process.err
    told = pipe.recv()
    if told == "may not":
        pytest.skip("needs the right to mount a file system of three megabytes")
    texts, state, names = told
    assert all("No space left on device" in text for text in texts), texts
    assert state == {"n": 0} and names == ["checkpoint_0"]


# --- the end of the process ------------------------------------------------------------------------
SCRIPT = """
import resource, sys, torch
from shardwise import checkpoint
model = torch.nn.Linear(1500, 1500)
if sys.argv[2] == "fails":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
checkpoint.async_save(sys.argv[1], models=[model], state={"n": 1})
"""


def test_a_process_does_not_end_before_its_save(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    good = processes.script(script, tmp_path / "good", "", whole_end=True)
    bad = processes.script(script, tmp_path / "bad", "fails", whole_end=True)
    assert good.finish()[0] == 0
    assert bad.finish()[0] == 120
    assert checkpoint.load(tmp_path / "good", models=[torch.nn.Linear(1500, 1500)]).state == {"n": 1}
    err = bad.finish()[2]
    assert "bad was not written" in err and "File too large" in err and "Traceback" not in err
    assert not Path(tmp_path / "bad").exists() and not list(tmp_path.glob("*.tmp-*"))
