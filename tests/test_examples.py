"""Every example runs, on one and on two ranks, and its numbers are what its text says."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

import processes
from models import assert_close
from ranks import run
from shardwise import checkpoint
from slowly import slow

EXAMPLES = Path(__file__).parent.parent / "examples"
_M_ARENA_MAX = -8  # of glibc's malloc.h


def example(name, *arguments):
    """Run an example's ``main`` in this process."""
    if name == "oom_retry":
        # Address space is limited there, and each new thread of a new process group may reserve 64 MiB for an arena.
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    return of_example(name, "main")(list(arguments))


def of_example(name, what):
    """Something that an example has."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # whose classes can be pickled
        spec.loader.exec_module(module)
        return getattr(module, what)
    finally:
        sys.path.remove(str(EXAMPLES))


# Whose ranks are of no use afterwards: in a forked process a profile that torch has made can end it when it is freed
# (2.13; in libkineto's ~MemoryTraceLogger), and one that ran out of memory may lack something.
LAST = ("profiling", "oom_retry")


def everywhere(size, name, *arguments):
    results = [example(name, *arguments)] if size == 1 else run(size, example, name, *arguments, fresh=name in LAST)
    if name != "profiling":
        assert all(result == results[0] for result in results), "the ranks disagree"
    return results[0]


sizes = pytest.mark.parametrize("size", [slow(1), 2])


def test_every_example_is_run_here():
    tested = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        assert path.stem == "toy" or f'"{path.stem}"' in tested, f"{path.name} has no test"


@pytest.mark.parametrize("size", [1, 2])
def test_minimal(size):
    assert everywhere(size, "minimal") > 0.8


@sizes
def test_accumulation(size):
    # 480 samples in batches of 16: 30 micro-batches, or 15 on each of two ranks; the last window is short.
    assert everywhere(size, "accumulation") == 4 * -(-30 // size // 4)


@sizes
def test_early_stopping(size):
    assert everywhere(size, "early_stopping") < 30 * 480 // 32 // size


@sizes
def test_metrics(size):
    seen, per_sample, summed = everywhere(size, "metrics")
    assert seen == 101 and per_sample == pytest.approx(summed, rel=1e-5)


@sizes
def test_checkpoint_and_resume(size, tmp_path):
    whole = everywhere(size, "checkpoint_and_resume", "--folder", str(tmp_path / "whole"), "--save-every", "4")
    first = everywhere(
        size, "checkpoint_and_resume", "--folder", str(tmp_path / "cut"), "--stop-after", "10", "--save-every", "4"
    )
    second = everywhere(
        size, "checkpoint_and_resume", "--folder", str(tmp_path / "cut"), "--save-every", "4", "--background"
    )
    assert first == whole[:10] and second == whole[8:], "the second run goes on after the checkpoint of step 8"
    assert len(list((tmp_path / "cut" / "checkpoints").glob("checkpoint_*"))) == 2


@sizes
def test_token_weighted(size):
    assert everywhere(size, "token_weighted") < 1.2


@sizes
def test_local_sgd(size):
    assert everywhere(size, "local_sgd") > 0.7


@sizes
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_oom_retry(size):
    # Less memory than by default, so that less is computed before it is used up: 2**13 samples want 256 MiB at once.
    fits = everywhere(size, "oom_retry", "--limit-mib", "320", "--starting-batch-size", str(2**13))
    assert 2**9 < fits < 2**13


@sizes
def test_profiling(size, tmp_path):
    assert "aten::" in everywhere(size, "profiling", "--traces", str(tmp_path))
    for rank in range(size):
        assert json.loads((tmp_path / f"profile_{rank}.json").read_text())["traceEvents"]


@sizes
def test_tracking(size, tmp_path):
    right = everywhere(size, "tracking", "--folder", str(tmp_path), "--with", "jsonl", "tensorboard")
    lines = [json.loads(line) for line in next(tmp_path.rglob("metrics.jsonl")).read_text().splitlines()]
    assert len(lines) == 5 * (480 // 32 // size + (480 // 32 % size > 0)) + 5
    assert any(right in (value, value.get("eval/accuracy")) if isinstance(value, dict) else right == value
               for value in lines[-1].values())  # fmt: skip
    assert list(tmp_path.rglob("events.out.tfevents*"))


@sizes
def test_cross_validation(size):
    assert everywhere(size, "cross_validation") > 0.7


@sizes
def test_larger_than_memory(size):
    answers, from_the_disk = everywhere(size, "larger_than_memory")
    assert from_the_disk and [len(answer) for answer in answers] == [5, 6, 7, 8, 9]
    assert answers == everywhere(1, "larger_than_memory")[0]


@sizes
def test_distributed_inference(size):
    pytest.importorskip("transformers")
    answers = everywhere(size, "distributed_inference")
    assert [answer.partition(" ->")[0] for answer in answers] == [str(list(range(1, 4 + i))) for i in range(5)]
    assert answers == everywhere(1, "distributed_inference")


@sizes
def test_transformers_model(size, tmp_path):
    transformers = pytest.importorskip("transformers")
    assert everywhere(size, "transformers_model", "--save", str(tmp_path)) < 1.0
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    ids = __import__("torch").arange(10)[None]
    assert model(input_ids=ids, labels=ids).loss.item() < 1.5


def test_trainer(tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    losses, evaluated = everywhere(2, "trainer", "--folder", str(tmp_path))
    assert losses[-1] < 1.0 and evaluated < 1.0 and (tmp_path / "model.safetensors").is_file()
    again, same = everywhere(1, "trainer", "--folder", str(tmp_path), "--resume")  # on another number of ranks
    assert again == pytest.approx(losses, rel=1e-3) and same == pytest.approx(evaluated, rel=1e-3)


@sizes
def test_peft_lora(size, tmp_path):
    pytest.importorskip("peft")
    first, last = everywhere(size, "peft_lora", "--save", str(tmp_path))
    assert last < first - 0.3
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_deepspeed_script(tmp_path):
    transformers = pytest.importorskip("transformers")
    whole = everywhere(2, "deepspeed_script")
    assert len(whole) == 24 and whole[-1] < whole[0] - 1
    folder = str(tmp_path / "run")
    first = everywhere(2, "deepspeed_script", "--save", folder, "--epochs", "1")
    rest = everywhere(2, "deepspeed_script", "--save", folder, "--epochs", "2")
    last = everywhere(1, "deepspeed_script", "--save", folder)  # on another number of ranks
    assert first + rest == whole[:16]
    assert last == pytest.approx(whole[16:], rel=1e-4)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    ids = __import__("torch").arange(10)[None]
    assert model(input_ids=ids, labels=ids).loss.item() < whole[-1] + 0.5


def test_trl_sft(tmp_path):
    pytest.importorskip("trl")
    first, last = everywhere(2, "trl_sft", "--save", str(tmp_path))
    assert last < first - 1
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "tokenizer.json").exists()


def test_peft_qlora(tmp_path):
    pytest.importorskip("peft")
    first, last = everywhere(2, "peft_qlora", "--save", str(tmp_path))
    assert last < first - 0.3
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 100_000 and not list(tmp_path.glob("model*"))


def test_diffusers_unet(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    first, last = everywhere(2, "diffusers_unet", "--save", str(tmp_path))
    assert last < 0.7 * first
    assert diffusers.DDPMPipeline.from_pretrained(tmp_path).unet.config.sample_size == 8


needs_lightning = pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="Lightning is not installed")


@needs_lightning
@pytest.mark.parametrize("size", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_lightning_module(size, tmp_path):
    arguments = ["--devices", str(size), "--folder", str(tmp_path)]
    assert run(size, example, "lightning_module", *arguments)[0] > 0.7
    assert (tmp_path / "best.pt").is_file() and (tmp_path / "last.ckpt").is_dir()


@needs_lightning
@pytest.mark.slow
@pytest.mark.parametrize("how", ["popen", "fork", "launch"])
def test_lightning_module_with_each_launcher(how, tmp_path):
    script = [str(EXAMPLES / "lightning_module.py"), "--folder", str(tmp_path), "--strategy", "zero2", "--epochs", "2"]
    command = [*script, "--devices", "2", "--start-method", how]
    if how == "launch":
        command = ["-m", "shardwise", "launch", "--nproc", "2", "--cpu", "--strategy", "zero3", *script]
    code, out, err = processes.program(*command).finish()
    assert code == 0, err
    assert "on 2 ranks" in out
    assert checkpoint.read_manifest(tmp_path / "last.ckpt").world_size == 2
    command[command.index("2", command.index("--epochs"))] = "4"
    code, out, err = processes.program(*command, "--resume", "last").finish()
    assert code == 0, err
    assert "Restoring states from the checkpoint" in err and "on 2 ranks" in out


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_ray_train(tmp_path):
    """A worker dies; the numbers are those of one plain process in which nobody did."""
    name = "ray_train"
    command = [EXAMPLES / f"{name}.py", "--folder", tmp_path, "--epochs", "4", "--kill-in", "2"]
    quiet = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    code, out, err = processes.program(*command, environment=quiet).finish(timeout=500)
    assert code == 0, err
    assert (tmp_path / "killed").exists() and "epoch 3," in out
    folder = out[out.index("epoch 3,") :].split()[-1]
    assert checkpoint.verify(folder).world_size == 2
    sharded, plain = (of_example("toy", "Classifier")() for _ in range(2))
    checkpoint.load_model(sharded, folder)
    train_alone_on_spirals(plain, 4)
    assert_close(sharded.state_dict(), plain.state_dict())


def train_alone_on_spirals(model, epochs):
    """What the workers of ``ray_train`` do together."""
    torch.manual_seed(0)
    model.apply(lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    points, arms = of_example("toy", "spirals")(480).tensors
    for epoch in range(epochs):
        order = torch.randperm(480, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(32):
            torch.nn.functional.cross_entropy(model(points[rows]), arms[rows]).backward()
            optimizer.step()
            optimizer.zero_grad()
