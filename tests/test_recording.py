"""Recorded runs: what is in the record is what happened, and it changes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import processes
import shardwise
from models import LM, adamw, assert_same, batch, forget_compiled, loss_of, make, rank, train, whole
from ranks import run
from shardwise import Accelerator, events
from shardwise.errors import RecordError
from shardwise.observe.recorded import read

STEPS = 7


def sent_so_far() -> dict[str, int]:
    return {kind: c.bytes_sent for kind, c in shardwise.stats().comm.items()}


def recorded(strategy: str, folder: str):
    """What ``train`` does, recorded; and what this rank's counters say of each step."""
    forget_compiled()
    model = make()
    shardwise.fully_shard(model, strategy=strategy)
    other = shardwise.fully_shard(make(), strategy=strategy)  # which is no part of it
    opt = adamw(model.parameters())
    losses, norms, sent = [], [], []
    with shardwise.record(model, folder, every=6) as recording:
        for step in range(STEPS):
            before = sent_so_far()
            loss = loss_of(model, batch(step, rank()))
            loss.backward()
            norms.append(shardwise.clip_grad_norm_(model, 0.5).item())
            opt.step()
            opt.zero_grad()
            losses.append(loss.item())
            recording.tell({"norm": norms[-1]}, loss=loss)
            sent.append({kind: n - before.get(kind, 0) for kind, n in sent_so_far().items() if n > before.get(kind, 0)})
        peak = shardwise.stats(model).peak
    assert not events.listeners and other is not model
    return (losses, norms, whole(model)), sent, peak


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_a_record_says_what_happened_and_changes_nothing(tmp_path, strategy):
    plain = run(2, train, strategy, STEPS)
    results = run(2, recorded, strategy, str(tmp_path))
    found = read(tmp_path)
    assert (found.world, found.missing, [one.rank for one in found.ranks]) == (2, [], [0, 1])
    for one, (got, sent, peak), (losses, norms, weights) in zip(found.ranks, results, plain, strict=True):
        assert (got[0], got[1]) == (losses, norms)
        assert_same(got[2], weights)
        assert [s["loss"] for s in one.steps] == losses and [s["values"]["norm"] for s in one.steps] == norms
        assert [{kind: n for kind, n in s["sent"].items() if n} for s in one.steps] == sent
        assert [s["tokens"] for s in one.steps] == [10] * STEPS
        assert [bool(s["flops"]) for s in one.steps] == [False] + [True] * (STEPS - 1)
        assert dict(zip(one.states, one.end["peak"], strict=True)) == peak
        assert [t["step"] for t in one.timelines] == [3, 4, 5, 6]
        assert one.models[0]["strategy"] == strategy and not one.cut
        assert len(one.measured()) == STEPS - 2
        line = one.timelines[0]
        step = one.steps[2]
        named = [(line["names"][p[1]], line["names"][p[2]]) for p in line["phases"]]
        assert ("forward", "'(root)'") in named and ("step", "AdamW") in named
        if strategy == "zero3":
            assert ("backward", "'blocks.1'") in named
        assert sum(t[4] for t in line["transfers"]) == sum(step["sent"].values())
        assert all(t[1] is not None and t[1] >= t[0] for t in line["transfers"])
        network = sum(w[1] - w[0] for w in line["waits"] if not w[4]) / 1e6
        assert network == pytest.approx(sum(step["waits"].values()), abs=1e-4)


def test_homes_are_heard_of(tmp_path):
    run(1, recorded, f"zero3,offload_optimizer=nvme,nvme_path={tmp_path}", str(tmp_path / "run"))
    one = read(tmp_path / "run").ranks[0]
    assert {"read", "write"} <= one.steps[-1]["sent"].keys()
    assert {"read", "write"} <= {one.timelines[0]["names"][t[2]] for t in one.timelines[0]["transfers"]}


def with_the_accelerator(folder: str):
    accelerator = Accelerator(cpu=True, strategy="zero2", gradient_accumulation_steps=2, profile_dir=folder)
    model = make()
    data = DataLoader([batch(i, 0)[0] for i in range(32)], batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, adamw(model.parameters()), data)
    losses = []
    for index, ids in enumerate(loader):
        with accelerator.accumulate(model):
            loss = loss_of(model, ids)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            accelerator.log({"index": index, "name": "x"})
    with torch.no_grad():
        loss_of(model, ids)
    accelerator.end_training()
    assert not events.listeners
    Accelerator(cpu=True, profile_dir=folder + "-2").end_training()
    return losses


def test_an_accelerator_tells_losses_batches_and_what_is_logged(tmp_path):
    results = run(2, with_the_accelerator, str(tmp_path / "run"))
    found = read(tmp_path / "run")
    for one, losses in zip(found.ranks, results, strict=True):
        assert len(losses) == 8 and [s["micro_batches"] for s in one.steps] == [2, 2, 2, 2]
        for step, pair in zip(one.steps, zip(losses[::2], losses[1::2], strict=True), strict=True):
            assert step["loss"] == pytest.approx(sum(pair) / 2)
            assert (step["rows"], step["tokens"]) == (4, 20)
        assert [s["values"] for s in one.steps] == [{"index": float(i)} for i in (1, 3, 5, 7)]
    assert len(read(tmp_path / "run-2").ranks) == 2


SCRIPT = """
import os, signal, sys, time, torch, shardwise
from models import adamw, batch, loss_of, make, rank
model = shardwise.fully_shard(make(), strategy="zero3")
optimizer = adamw(model.parameters())
with shardwise.record(model, "elsewhere") as recording:
    for step in range(5):
        loss = loss_of(model, batch(step, rank()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recording.tell(loss=loss)
if "--die" in sys.argv:
    time.sleep(0.6)
    for step in range(2):
        loss_of(model, batch(step, rank())).backward()
        optimizer.step()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def launched(folder: Path, *args: str) -> tuple[int, str, str]:
    (folder / "job.py").write_text(SCRIPT)
    tests = Path(__file__).parent
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SHARDWISE_", "OMP_"))}
    environment = {**inherited, "PYTHONPATH": f"{tests.parent / 'src'}:{tests}", "XDG_CONFIG_HOME": str(folder)}
    return processes.module(
        "shardwise",
        "launch",
        "-n",
        2,
        "--cpu",
        "--record",
        "here",
        "job.py",
        *args,
        cwd=folder,
        environment=environment,
    ).finish()


def test_the_launcher_records_every_rank_and_a_kill_leaves_what_was_written(tmp_path):
    code, _, err = launched(tmp_path)
    assert code == 0, err
    found = read(tmp_path / "here")
    assert [len(one.steps) for one in found.ranks] == [5, 5] and all(one.end for one in found.ranks)
    assert found.ranks[0].steps[0]["loss"] is not None and not (tmp_path / "elsewhere").exists()
    code, _, _ = launched(tmp_path, "--die")
    assert code == 1
    with pytest.raises(RecordError, match="it holds 2 runs") as caught:
        read(tmp_path / "here")
    second = read(tmp_path / "here", caught.value.fix.split()[1])
    assert len(second.ranks) == 2
    for one in second.ranks:
        assert one.end is None and len(one.steps) >= 4


def test_what_cannot_be_read_is_one_error(tmp_path):
    def says(words: str, run: str | None = None) -> None:
        with pytest.raises(RecordError, match=words):
            read(folder, run)

    folder = tmp_path / "none"
    says("there is no such folder")
    folder.mkdir()
    says("there is no record in it")
    head = {"kind": "run", "format": 1, "run": "a", "rank": 0, "world": 2, "states": [], "time": 0.0, "device": {}}
    path = folder / "a-rank00000.jsonl"
    path.write_text(json.dumps(head)[:20])
    says("cut before the end of its first line")
    path.write_text(json.dumps({**head, "format": 9}) + "\n")
    says("it is of format 9, and this version reads 1")
    path.write_text(json.dumps(head) + '\n{"kind": "step", "st')
    found = read(folder)
    assert found.missing == [1] and found.ranks[0].cut
    path.write_text(json.dumps(head) + '\n{"kind": "step", "st\n{"kind":"end"}\n')
    says("line 2 is damaged")
    path.write_text(json.dumps(head) + '\n{"kind": "step", "step": 1}\n')
    says("line 2 is damaged")
    path.write_text(json.dumps({"kind": "end"}) + "\n")
    says("cut before")
    path.write_text(json.dumps(head) + "\n")
    (folder / "b-rank00000.jsonl").write_text(json.dumps({**head, "run": "b"}) + "\n")
    says("it holds 2 runs: a, b")
    says("no run in it begins with 'c'", "c")
    assert read(folder, "b").run == "b"


def test_compiled_code_stays_compiled(tmp_path):
    """To count its operations would be to run it as it is written."""
    model = shardwise.fully_shard(make(), strategy="ddp")
    optimizer = adamw(model.parameters())
    compiled = torch.compile(loss_of, backend="eager")
    with shardwise.record(model, tmp_path):
        for step in range(3):
            compiled(model, batch(step, 0)).backward()
            optimizer.step()
    forget_compiled()
    assert [(s["flops"], s["counting"]) for s in read(tmp_path).ranks[0].steps] == [(None, False)] * 3


def test_a_copied_and_a_pickled_model_are_not_recorded(tmp_path):
    import copy
    import pickle

    model = shardwise.fully_shard(make(), strategy="ddp")
    with shardwise.record(model, tmp_path):
        other = copy.deepcopy(model)
        assert isinstance(other, LM)
    loss_of(other, batch(0, 0)).backward()
    assert pickle.dumps(list(model._forward_pre_hooks)) is not None


def on_a_device(folder: str):
    model = shardwise.fully_shard(make().to("sim"), strategy="zero3,offload_optimizer=cpu")
    opt = adamw(model.parameters())
    with shardwise.record(model, folder, every=1000) as recording:
        for step in range(STEPS):
            loss = loss_of(model, batch(step, rank()).to("sim"))
            loss.backward()
            opt.step()
            opt.zero_grad()
            recording.tell(loss=loss)


@pytest.mark.usefixtures("simulated_device")
def test_a_device_that_runs_late_is_read_by_its_own_clock(tmp_path):
    run(2, on_a_device, str(tmp_path), device="sim")
    for one in read(tmp_path).ranks:
        assert one.head["device"]["type"] == "sim"
        assert [s["clock"] for s in one.steps] == ["host", "host", "device", "device", "device", "host", "host"]
        assert all(isinstance(s["loss"], float) for s in one.steps)
        for step, line in zip(one.steps[2:5], one.timelines, strict=True):
            at = [phase[0] for phase in line["phases"]]
            assert at == sorted(at) and {"to_host", "to_device"} <= {line["names"][t[2]] for t in line["transfers"]}
            took = (at[-1] - at[0]) / 1e6
            assert sum(step["seconds"].values()) == pytest.approx(took, rel=0.2, abs=0.05)
