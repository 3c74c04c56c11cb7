"""``shardwise demo`` through the command line: a tiny model, a few steps, every strategy."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models import PRESETS
from shardwise.cli.demo import corpus
from shardwise.cli.demo.model import GPT, SIZES
from test_launch import command, refused, start

STEPS = 6


@pytest.mark.parametrize(
    "preset",
    [*(pytest.param(p, marks=pytest.mark.slow) for p in PRESETS), "zero3,offload_optimizer=nvme"],
)
def test_demo_states_what_happened(preset: str, tmp_path: Path) -> None:
    code, out, err = command(
        "demo", "--cpu", "--size", "tiny", "--steps", STEPS, "--strategy", preset, "--json", "--out", "here",
        cwd=tmp_path,
    )  # fmt: skip
    assert code == 0, err
    facts = json.loads(out)  # nothing else is on stdout
    assert facts["steps"] == STEPS and facts["ranks"] == 2 and facts["strategy"] == preset
    assert facts["trained_bytes"] == STEPS * 2 * SIZES["tiny"].rows * SIZES["tiny"].context

    bits = facts["bits_per_byte"]
    assert bits["uniform"] == 8
    assert 3 < bits["bigram"] < 4
    assert bits["model"] < 7.9

    assert facts["sent_per_step"]["measured"] == facts["sent_per_step"]["expected"]

    psi = 4 * facts["parameters"]  # bytes of one copy in fp32
    ddp, ranks = facts["memory"]["ddp"], facts["memory"]["ranks"]
    assert (ddp["parameters"], ddp["gradients"], ddp["optimizer"]) == (psi, psi, pytest.approx(2 * psi, rel=0.01))
    assert len(ranks) == 2
    for rank in ranks:
        assert rank["parameters"] == (psi // 2 if "zero3" in preset else psi)
        if "nvme" in preset:
            assert rank["optimizer"] < 0.01 * psi and rank["offload_buffers"] > 0
        else:
            assert rank["optimizer"] == pytest.approx(2 * psi if preset == "ddp" else psi, rel=0.01)
        assert rank["activations"] > 0
        assert rank["total"] == sum(n for state, n in rank.items() if state != "total")

    disk = facts["disk"]
    if "nvme" in preset:
        assert disk["read_per_step"] == pytest.approx(2 * psi, rel=0.05)
        assert disk["bytes_per_second"] > 0 and disk["probe_bytes_per_second"] > 0 and 0 <= disk["hidden"] <= 1
    else:
        assert disk is None
    assert facts["sample"].startswith("def ")
    weights = load_file(tmp_path / "here" / "model.safetensors")
    model = GPT(SIZES["tiny"])
    model.load_state_dict(weights)  # the plain names, all of them
    assert sum(p.numel() for p in model.parameters()) == facts["parameters"] == SIZES["tiny"].parameters

    # The saved model is the one that was measured.
    text = corpus.load()
    rows = torch.from_numpy(corpus.windows(text.heldout, model.shape.context, 1 << 16, multiple=2)).long()
    with torch.no_grad():
        nats = torch.nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    assert nats.item() / np.log(2) == pytest.approx(bits["model"], rel=1e-4)


@pytest.mark.slow
def test_one_rank_prints_tables(tmp_path: Path) -> None:
    code, out, err = command("demo", "--cpu", "--nproc", 1, "--size", "tiny", "--steps", 1, cwd=tmp_path)
    assert code == 0, err
    for part in ("bits per byte", "optimizer state", "ddp needs", "the formula's 0", "demo/model.safetensors"):
        assert part in out
    assert "training 100%  step 1" in err
    assert "\x1b" not in out + err  # no colours and no bars in a pipe


def test_ctrl_c_ends_the_demo(tmp_path: Path) -> None:
    process = start("demo", "--cpu", "--size", "tiny", "--minutes", 5, cwd=tmp_path)
    process.until(lambda: "\ntraining " in process.err)
    process.send_signal(signal.SIGINT)
    code, out, err = process.finish()
    assert code == 130
    assert "stopped by Ctrl-C" in err and "Traceback" not in err and out == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--strategy", "zero4"], "one of ddp"),
        (["--strategy", "hsdp,shard_size=3"], "does not divide"),
        (["--nproc", "0"], "--nproc 0"),
        (["--size", "huge"], "one of tiny, small"),
        (["--steps", "0"], "--steps 0"),
        (["--minutes", "0"], "--minutes 0"),
        (["--out", "file/under"], "cannot write to file/under"),
    ],
)
def test_a_wrong_request_is_refused(
    args: list[str], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert message in refused(monkeypatch, capsys, "demo", "--cpu", *args)


def test_no_file_is_on_both_sides_and_the_baseline_is_a_baseline() -> None:
    text = corpus.load()
    again = corpus.load()
    assert np.array_equal(text.train, again.train) and np.array_equal(text.heldout, again.heldout)
    part = text.heldout_files / (text.heldout_files + text.train_files)
    assert 0.05 < part < 0.2
    # On text without any pattern, the counts know nothing.
    noise = np.random.default_rng(0).integers(0, 256, 1 << 22, dtype=np.uint8)
    assert corpus.bigram_bits(noise, corpus.windows(noise, 64, 1 << 16, 1)) == pytest.approx(8, abs=0.05)
    # On a cycle of two bytes they know everything.
    cycle = np.tile(np.array([1, 2], dtype=np.uint8), 1 << 20)
    assert corpus.bigram_bits(cycle, corpus.windows(cycle, 64, 1 << 16, 1)) < 0.01


def test_a_shape_knows_its_size() -> None:
    for name in ("tiny", "small", "10m"):
        assert sum(p.numel() for p in GPT(SIZES[name]).parameters()) == SIZES[name].parameters
