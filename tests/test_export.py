"""Checkpoints without their model: written as safetensors, compared, checked, looked into; and the commands for it."""

from __future__ import annotations

import json
import os
import pty
import shutil
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

import processes
import shardwise
from models import adamw, assert_same, batch, loss_of, make, rank, whole
from ranks import run
from shardwise import checkpoint
from shardwise.checkpoint import coordination
from shardwise.checkpoint.conversion import check
from shardwise.checkpoint.manifest import BLOCK
from terminals import written
from test_load_model import Deep, failure, peak_of


def trained(folder, strategy, seed=0, **kw):
    """Two models in one checkpoint, the first one trained."""
    model = shardwise.fully_shard(make(seed, tied=True, **kw), strategy=strategy)
    optimizer = adamw(model.parameters())
    loss_of(model, batch(0, rank())).backward()
    optimizer.step()
    second = nn.Linear(3, 2)
    checkpoint.save(
        folder,
        models=[model, second],
        optimizers=[optimizer],
        info={"step": 12, "epoch": 1},
        state={"schedulers": [], "rate": torch.ones(1)},
    )
    return whole(model)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run's checkpoints, and what the model was at the last of them."""
    root = tmp_path_factory.mktemp("run")
    run(2, trained, root / "checkpoint_9", "zero1", 1)
    return root, run(2, trained, root / "checkpoint_10", "zero3", 0)[0]


# --- export ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", ["10GB", "5KB"])
def test_export_writes_what_safetensors_reads(folders, tmp_path, size):
    root, expected = folders
    checkpoint.export(root / "checkpoint_10", tmp_path / "out", max_shard_size=size)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert len(files) > 3 if size == "5KB" else len(files) == 1
    found = {}
    for file in files:
        found |= safetensors.torch.load_file(file)
    assert_same(found, {k: v for k, v in expected.items() if k != "head.weight"})
    if size == "5KB":
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(found)
        assert all(sum(t.nbytes for t in safetensors.torch.load_file(f).values()) <= 5000 for f in files)
    again = make(5, tied=True)
    checkpoint.load_model(again, tmp_path / "out")
    assert_same(whole(again), expected)


def test_another_part_and_another_dtype(folders, tmp_path):
    root, expected = folders
    checkpoint.export(root / "checkpoint_10", tmp_path / "second", part="model_1")
    assert sorted(safetensors.torch.load_file(tmp_path / "second" / "model.safetensors")) == ["bias", "weight"]
    checkpoint.export(root / "checkpoint_10", tmp_path / "half", dtype=torch.bfloat16)
    found = safetensors.torch.load_file(tmp_path / "half" / "model.safetensors")
    assert torch.equal(found["embed.weight"], expected["embed.weight"].bfloat16())


def saves_for_transformers(folder, config):
    from transformers import GPT2LMHeadModel

    model = shardwise.fully_shard(GPT2LMHeadModel(config), strategy="zero3,param_dtype=bf16")
    optimizer = adamw(model.parameters())
    ids = torch.randint(0, 50, (2, 8), generator=torch.Generator().manual_seed(rank()))
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    checkpoint.save(folder, models=[model], optimizers=[optimizer])
    return whole(model)


def test_from_pretrained_reads_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    expected = run(2, saves_for_transformers, tmp_path / "saved", config)[0]
    checkpoint.export(tmp_path / "saved", tmp_path / "out", max_shard_size="20KB")
    config.save_pretrained(tmp_path / "out")
    model, said = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(said.values())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_same(whole(model), expected)
    ids = torch.arange(8)[None]
    plain = transformers.GPT2LMHeadModel(config)
    plain.load_state_dict(expected)
    assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)


def exports_large(folder):
    model = Deep(1, 2048, 4)  # 64 MiB, and tensors larger than a block
    checkpoint.save(folder / "a", models=[model])
    checkpoint.export(folder / "a", folder / "b", dtype=torch.bfloat16)
    shutil.rmtree(folder / "b")
    grown = peak_of(lambda: checkpoint.export(folder / "a", folder / "b", dtype=torch.bfloat16))
    found = safetensors.torch.load_file(folder / "b" / "model.safetensors")
    assert all(torch.equal(v, found[k].float()) for k, v in whole(model.bfloat16().float()).items())
    return grown


def test_exporting_takes_five_blocks(tmp_path):
    (grown,) = run(1, exports_large, tmp_path)
    assert grown <= 5 * BLOCK + (4 << 20), grown  # the checksums take five, and what comes after them two


def test_what_cannot_be_exported(folders, tmp_path):
    root, _ = folders
    assert "choose another folder" in failure(checkpoint.export, root / "checkpoint_9", root / "checkpoint_9")
    (tmp_path / "file").write_text("x")
    assert str(tmp_path / "file") in failure(checkpoint.export, root / "checkpoint_9", tmp_path / "file")
    assert "there is no part 'x'" in failure(checkpoint.export, root / "checkpoint_9", tmp_path / "out", part="x")
    text = failure(checkpoint.export, root / "checkpoint_9", tmp_path / "out", dtype=torch.int8)
    assert "floating-point" in text and not (tmp_path / "out").exists()
    damaged = copied(root / "checkpoint_9", tmp_path / "damaged")
    assert "__1_0.distcp" in failure(checkpoint.export, damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def copied(path, to):
    """A copy with one bit changed."""
    shutil.copytree(path, to)
    data = bytearray((to / "__1_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (to / "__1_0.distcp").write_bytes(data)
    return to


# --- differences --------------------------------------------------------------------------------------------
def test_compare(tmp_path):
    state = {
        "a": torch.tensor([1.0, float("nan"), float("inf"), -float("inf")]), "b": torch.arange(6.0).view(2, 3),
        "n": torch.tensor([2**62, 1]), "f": torch.ones(3), "c": torch.tensor([1 + 2j]), "d": torch.tensor([True]),
    }  # fmt: skip
    other = {
        **state, "b": state["b"] + torch.tensor([0.0, 0.5, -0.25]), "n": state["n"] + torch.tensor([1, 0]),
        "f": state["f"].bfloat16(), "c": state["c"] + 3j, "g": torch.ones(1), "s": torch.ones(2, 2),
    }  # fmt: skip
    torch.save({**state, "s": torch.ones(4)}, tmp_path / "a.pt")
    torch.save(other, tmp_path / "b.pt")
    safetensors.torch.save_file(other, tmp_path / "b.safetensors")
    torch.save({"model": {f"module.{k}": v for k, v in other.items()}}, tmp_path / "c.pt")
    for b in ("b.pt", "b.safetensors"):
        found = checkpoint.compare(tmp_path / "a.pt", tmp_path / b)
        assert found.same == 2
        assert {(d.name, d.what, d.largest) for d in found.differences} == {
            ("b", "values", 0.5), ("n", "values", 1.0), ("f", "dtype", 0.0), ("c", "values", 3.0),
            ("g", "only in B", None), ("s", "shape", None),
        }  # fmt: skip
    assert not checkpoint.compare(tmp_path / "b.safetensors", tmp_path / "c.pt").differences
    torch.save({"a": torch.zeros(4)}, tmp_path / "d.pt")
    (difference,) = checkpoint.compare(tmp_path / "d.pt", tmp_path / "b.pt", part="").differences[:1]
    assert difference.name == "a" and difference.largest != difference.largest
    torch.save({"z": torch.zeros(4)}, tmp_path / "e.pt")
    assert "no name in common" in failure(checkpoint.compare, tmp_path / "e.pt", tmp_path / "b.safetensors")


# --- the commands --------------------------------------------------------------------------------------------
def command(*args, code=0):
    """Start it; ``finished`` reads what it said."""
    return processes.module("shardwise", "checkpoint", *args), code


def finished(started):
    process, code = started
    found, out, err = process.finish()
    assert found == code, (found, out, err)
    assert "Traceback" not in err
    return out, err


def test_the_commands(folders, tmp_path):
    root, expected = folders
    last, out = root / "checkpoint_10", tmp_path / "out"
    damaged = copied(last, tmp_path / "damaged")
    safetensors.torch.save_file(expected, tmp_path / "x.safetensors")
    running = {
        "inspect": command("inspect", last), "json": command("inspect", last, "--json"),
        "series": command("inspect", root), "summary": command("inspect", "-s", tmp_path / "x.safetensors"),
        "nothing": command("inspect", tmp_path / "nothing", code=2),
        "verify": command("verify", root), "damaged": command("verify", damaged, code=1),
        "export": command("export", last, out, "--max-shard-size", "5KB"),
        "dtype": command("export", last, out, "--dtype", "int8", code=2),
        "diff": command("diff", root / "checkpoint_9", last, code=1),
        "same": command("diff", last, tmp_path / "x.safetensors"),
        "diff json": command("diff", root / "checkpoint_9", last, "--part", "model", "--json", code=1),
    }  # fmt: skip
    said = {name: finished(started) for name, started in running.items()}

    text = said["inspect"][0]
    for word in (
        "a checkpoint of Shardwise", "LM (zero3), Linear (not sharded)", "AdamW", "world size", "step", "12",
        "schedulers, rate",
        "blocks.0.up.weight", "(39, 13)", "float32", "exp_avg, exp_avg_sq", "tied to embed.weight", "model_1",
    ):  # fmt: skip
        assert word in text, text
    found = json.loads(said["json"][0])
    assert found["step"] == 12 and found["world size"] == 2
    assert {row["name"] for row in found["tensors"]} == {f"model.{k}" for k in expected} | {
        "model_1.weight", "model_1.bias"
    }  # fmt: skip
    row = next(row for row in found["tensors"] if row["name"] == "model.norm.weight")
    assert row["shape"] == [13] and row["bytes"] == 52 and sorted(row["optimizer_state"]) == [
        "exp_avg", "exp_avg_sq", "step"
    ]  # fmt: skip
    series = said["series"][0]
    assert series.index("checkpoint_9") < series.index("checkpoint_10")
    assert f"{len(expected)} names" in said["summary"][0] and "norm.weight" not in said["summary"][0]
    assert said["nothing"][1].startswith("error: ") and "there is no such checkpoint" in said["nothing"][1]
    assert said["verify"][0].count("every byte is as it was written") == 2
    assert "__1_0.distcp" in said["damaged"][0] and "checksum" in said["damaged"][0]
    assert "model-00001-of-" in said["export"][1] and len(list(out.glob("*.safetensors"))) > 3
    assert "--dtype int8" in said["dtype"][1]
    assert "model.head.weight" in said["diff"][0] and "optimizer.state.norm.bias.exp_avg" in said["diff"][0]
    assert "0 different" in said["same"][0]
    rows = json.loads(said["diff json"][0])["differences"]
    assert {row["difference"] for row in rows} == {"values"} and all(row["largest"] > 0 for row in rows)


def test_foreign_folders_are_checked_for_what_can_be(tmp_path):
    checkpoint.save_model(make(1), tmp_path / "hf", max_shard_size="5KB")
    source, problems = check(tmp_path / "hf")
    assert source.kind == "safetensors" and not problems
    file = next((tmp_path / "hf").glob("model-00002*"))
    file.write_bytes(file.read_bytes()[:-1])
    assert "cut off" in failure(check, tmp_path / "hf")


def test_a_bar_on_a_terminal_only(folders, tmp_path, monkeypatch, capfd):
    root, _ = folders
    model = Deep(0, 64, 2)
    checkpoint.save(tmp_path / "a", models=[model])
    calls = {
        "checking": lambda: check(root / "checkpoint_9"),
        "writing": lambda: checkpoint.save(tmp_path / "b", models=[model]),
        "loading": lambda: checkpoint.load(tmp_path / "a", models=[model]),
    }
    for words, call in calls.items():
        ours, theirs = pty.openpty()
        with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", terminal)
            patched.setenv("TERM", "xterm")
            patched.setattr(coordination, "_MOMENT_S", 0.0)
            call()
            terminal.flush()
            shown = written(ours)
        os.close(ours)
        assert words in shown
        call()
    assert capfd.readouterr().err == ""
