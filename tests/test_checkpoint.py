"""Checkpoints: what was saved comes back exactly; and nothing bad gets in or lost."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import shardwise
from models import PRESETS, adamw, assert_same, batch, loss_of, make, rank, step, whole, world
from ranks import run
from shardwise import checkpoint
from shardwise.checkpoint.model_state import boxes
from shardwise.checkpoint.torch_format import archivable, archive_around
from shardwise.errors import CheckpointError


def read_all(path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by torch's own tools in one process."""
    out = Path(path).with_name(Path(path).name + ".whole.pt")
    dcp_to_torch_save(path, out)
    flat: dict[str, torch.Tensor] = {}

    def walk(value, name):
        if isinstance(value, dict):
            for k, v in value.items():
                walk(v, f"{name}.{k}" if name else k)
        else:
            flat[name] = value

    walk(torch.load(out, weights_only=True), "")
    out.unlink()
    return flat


def build(strategy, optimizer=adamw, seed=0, **kw):
    model = make(seed=seed, **kw)
    if strategy != "none":
        shardwise.fully_shard(model, strategy=strategy)
    return model, optimizer(model.parameters())


def trained(path, strategy, steps=2, optimizer=adamw, **kw):
    model, opt = build(strategy, optimizer, **kw)
    for i in range(steps):
        step(model, opt, i)
    checkpoint.save(path, models=[model], optimizers=[opt], state={"step": steps}, info={"step": steps})
    return whole(model)


def trained_tied(path, strategy):
    return trained(path, strategy, tied=True)


def failure(function, *args, **kw) -> str:
    """What a rank's CheckpointError says."""
    try:
        function(*args, **kw)
    except CheckpointError as error:
        return str(error)
    return ""


# --- bitwise continuation ------------------------------------------------------------------------
def momentum(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True)


def fused(params):
    return torch.optim.AdamW(params, lr=1e-2, fused=True, amsgrad=True)


def nadam(params):
    return torch.optim.NAdam(params, lr=1e-2)


def continues(path, strategy, optimizer):
    model, opt = build(strategy, optimizer, odd=optimizer is not fused)
    for i in range(2):
        step(model, opt, i)
    checkpoint.save(path, models=[model], optimizers=[opt], rank_state={"rng": checkpoint.rng_state()})
    noise = torch.rand(3), random.random(), np.random.rand()
    straight = [step(model, opt, i) for i in (2, 3)], whole(model)

    other, other_opt = build(strategy, optimizer, seed=3, odd=optimizer is not fused)
    loaded = checkpoint.load(path, models=[other], optimizers=[other_opt])
    checkpoint.set_rng_state(loaded.rank_state["rng"])
    assert torch.equal(torch.rand(3), noise[0])
    assert (random.random(), np.random.rand()) == noise[1:]
    if strategy != "none":
        loaded_live, live = shardwise.stats(other).live, shardwise.stats(model).live
        assert loaded_live["optimizer"] == live["optimizer"]  # the ledger knows of loaded state
    again = [step(other, other_opt, i) for i in (2, 3)], whole(other)
    if strategy != "none":
        assert shardwise.stats(other).live == shardwise.stats(model).live
    assert straight[0] == again[0]
    assert_same(straight[1], again[1])
    return True


@pytest.mark.parametrize("strategy", [*PRESETS, "zero2,param_dtype=bf16", "zero3,param_dtype=fp16,reduce_dtype=fp32"])
def test_a_resumed_run_is_bitwise_the_same(tmp_path, strategy):
    run(2, continues, tmp_path / "c", strategy, adamw)


@pytest.mark.parametrize("optimizer", [momentum, fused, nadam, torch.optim.ASGD, torch.optim.Adafactor])
def test_a_resumed_run_is_bitwise_the_same_with_other_optimizers(tmp_path, optimizer):
    layout = "zero3,layout=tensor" if optimizer is torch.optim.Adafactor else "zero3"
    run(2, continues, tmp_path / "c", layout, optimizer)
    if optimizer is momentum:
        run(4, continues, tmp_path / "d", "hsdp,shard_size=2", optimizer)
        run(1, continues, tmp_path / "e", "none", optimizer)


def between_passes(path, strategy):
    """Loading finds gathers on their way and units that stayed gathered; no stale value may survive it."""
    source = shardwise.fully_shard(make(seed=3), strategy="ddp")
    checkpoint.save(path, models=[source])
    expected = loss_of(source, batch(1, rank()))
    model, opt = build(strategy)
    with torch.no_grad():
        loss_of(model, batch(0, rank()))
    checkpoint.load(path, models=[model])
    assert torch.equal(loss_of(model, batch(1, rank())), expected)  # a forward without a backward
    checkpoint.load(path, models=[model])
    step(model, opt, 0)  # its publishing is under way
    checkpoint.load(path, models=[model])
    assert torch.equal(loss_of(model, batch(1, rank())), expected)
    return True


@pytest.mark.parametrize("strategy", PRESETS)
def test_loading_between_passes_leaves_nothing_stale(tmp_path, strategy):
    run(2, between_passes, tmp_path / "a", strategy)


# --- several of everything -------------------------------------------------------------------------
class Odd(nn.Module):
    """Frozen weights, buffers of both kinds, a tied buffer, extra state, integers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 5)
        self.frozen.requires_grad_(False)
        self.out = nn.Linear(5, 1)
        self.count = nn.Parameter(torch.tensor([1, 2, 3]), requires_grad=False)
        self.register_buffer("kept", torch.randn(3))
        self.register_buffer("same", self.kept)
        self.register_buffer("passing", torch.randn(2), persistent=False)
        self.words = "fresh"

    def get_extra_state(self):
        return {"words": self.words}

    def set_extra_state(self, state):
        self.words = state["words"]

    def forward(self, x):
        return self.out(self.frozen(self.norm(x)))


def several(path, save):
    """Three models of different strategies, three optimizers, one of which never stepped."""
    torch.manual_seed(int(not save))
    first, second, third = Odd(), make(d=8), nn.Linear(3, 3)
    shardwise.fully_shard(first, strategy="zero3,broadcast_buffers=false")
    shardwise.fully_shard(second, strategy="zero1")
    one = torch.optim.AdamW([{"params": first.parameters()}, {"params": third.parameters(), "lr": 0.5}], lr=0.1)
    two, three = momentum(second.parameters()), adamw(second.parameters())
    models, optimizers = [first, second, third], [one, two, three]
    if save:
        first.words = "saved"
        one.param_groups[1]["lr"] = 0.25
        for i in range(2):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank() + 2 * i))
            (first(x).sum() + third(torch.ones(3)).sum()).backward()
            one.step()
            step(second, two, i)
        checkpoint.save(path, models=models, optimizers=optimizers)
        checkpoint.save(f"{path}-fresh", models=models[1:2], optimizers=optimizers[2:])
    else:
        step(second, three, 0)  # its state must go
        checkpoint.load(path, models=models, optimizers=optimizers)
        assert len(three.state) == 0
        checkpoint.load(f"{path}-fresh", models=models[1:2], optimizers=optimizers[2:])
        step(second, three, 0)
        checkpoint.load(path, models=models, optimizers=optimizers)
    assert one.param_groups[1]["lr"] == 0.25
    assert first.same is first.kept
    values = [{k: v.clone() for k, v in m.state_dict().items() if torch.is_tensor(v)} for m in models]
    return values, first.words, first.passing


def test_several_models_and_optimizers_in_one_checkpoint(tmp_path):
    saved = run(2, several, tmp_path / "s", True)
    same = run(2, several, tmp_path / "s", False)
    fewer = run(1, several, tmp_path / "s", False)
    for before, after in zip(saved, same, strict=True):
        for a, b in zip(before[0], after[0], strict=True):
            assert_same(a, b)  # each rank its own batch statistics
        assert after[1] == "saved"
        assert not torch.equal(before[2], after[2])
    assert not torch.equal(saved[0][0][0]["norm.running_mean"], saved[1][0][0]["norm.running_mean"])
    for a, b in zip(saved[0][0], fewer[0][0], strict=True):
        assert_same(a, b)  # rank 0's
    names = read_all(tmp_path / "s")
    assert torch.equal(names["model.same"], names["model.kept"])
    assert {"model_1.embed.weight", "model_2.weight", "optimizer.state.model_2:weight.exp_avg"} <= names.keys()
    assert "optimizer.state.frozen.weight.exp_avg" not in names
    assert not any(n.startswith("optimizer_2.state") for n in names)


class Counting(torch.optim.Optimizer):
    """An optimizer with numbers, ``None`` and odd shapes in its state, and an entry of its own in its state dict."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "betas": (0.5, 0.25)})
        self.clock = 0

    def step(self, closure=None):
        self.clock += 1
        for p in (p for g in self.param_groups for p in g["params"] if p.grad is not None):
            state = self.state[p]
            state["seen"] = state.get("seen", 0) + 1
            state["scale"], state["lucky"], state["none"] = 0.1 * state["seen"], True, None
            state["rows"] = p.grad.sum(-1) if p.dim() else p.grad.clone()
            state["low"] = p.grad.to(torch.bfloat16)
            p.data.sub_(p.grad * state["scale"])

    def state_dict(self):
        return {**super().state_dict(), "clock": self.clock}

    def load_state_dict(self, state):
        self.clock = state.pop("clock")
        super().load_state_dict(state)


def counting(path, strategy, save):
    model, opt = build(strategy, Counting, seed=int(not save))
    if save:
        for i in range(3):
            step(model, opt, i)
        checkpoint.save(path, models=[model], optimizers=[opt])
    else:
        checkpoint.load(path, models=[model], optimizers=[opt])
    state = next(iter(opt.state.values()))
    return opt.clock, opt.param_groups[0]["betas"], {k: v for k, v in state.items() if not torch.is_tensor(v)}


def test_unusual_optimizer_state(tmp_path):
    saved = run(2, counting, tmp_path / "a", "zero2,layout=tensor", True)[0]
    assert saved == (3, (0.5, 0.25), {"seen": 3, "scale": 0.1 * 3, "lucky": True, "none": None})
    assert run(3, counting, tmp_path / "a", "zero3,layout=tensor", False)[0] == saved
    assert run(1, counting, tmp_path / "a", "none", False)[0] == saved


def wrapped(path):
    inner = make()
    checkpoint.save(path, models=[inner])
    outer = shardwise.DistributedDataParallel(make(seed=2))
    checkpoint.load(path, models=[outer])
    compiled = torch.compile(make(seed=4))
    checkpoint.load(path, models=[compiled])
    assert_same(whole(outer.module), whole(inner))
    assert_same(whole(compiled._orig_mod), whole(inner))
    return True


def test_wrappers_are_looked_through(tmp_path):
    run(2, wrapped, tmp_path / "a")


# --- torch's own tools -------------------------------------------------------------------------------
@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_plain_distributed_checkpoint_reads_it_and_each_rank_wrote_its_share(tmp_path, strategy):
    saved = run(3, trained_tied, tmp_path / "a", strategy)[0]
    model = make(seed=9, tied=True)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "a", no_dist=True)
    model.load_state_dict(state["model"])
    assert_same(whole(model), saved)
    index = dcp.FileSystemReader(tmp_path / "a").read_metadata()
    share = [0, 0, 0]
    for name, tensor in index.state_dict_metadata.items():
        if name != "model.head.weight":  # the same bytes as model.embed.weight
            for chunk in tensor.chunks:
                info = index.storage_data[dcp.metadata.MetadataIndex(name, chunk.offsets)]
                share[int(info.relative_path[2])] += math.prod(chunk.sizes)
    states = 3 * sum(p.numel() for p in model.parameters())
    assert states <= sum(share) < states + 50  # and one step count per parameter
    assert max(share) < 0.4 * states


@given(st.lists(st.integers(0, 5), max_size=4), st.data())
@settings(max_examples=200, deadline=None)
def test_boxes_are_the_range(shape, data):
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    index = torch.arange(numel).view(shape)
    covered = []
    for offsets, sizes, lo, hi in boxes(shape, start, stop):
        box = index[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
        assert box.reshape(-1).tolist() == list(range(lo, hi))
        covered += range(lo, hi)
    assert covered == list(range(start, stop))
    assert len(boxes(shape, start, stop)) <= max(2 * len(shape) - 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64, torch.uint8])
def test_an_archive_made_by_hand_is_torchs(dtype):
    for shape in ((), (0, 4), (3,), (5, 7, 2), (1, 1)):
        tensor = (torch.randn(shape) * 10).to(dtype)
        before, after = archive_around(dtype, shape)
        data = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        again = torch.load(io.BytesIO(before + data + after), weights_only=True)
        assert torch.equal(again, tensor) and again.dtype == dtype and again.stride() == tensor.stride()
    assert not archivable(torch.complex64)


def test_an_archive_of_more_than_four_gigabytes(tmp_path):
    n = 5 << 30
    before, after = archive_around(torch.uint8, (n,))
    with open(tmp_path / "large.pt", "wb") as file:  # nearly all of it a hole
        file.write(before)
        file.seek(len(before) + n - 3)
        file.write(b"abc" + after)
    large = torch.load(tmp_path / "large.pt", weights_only=True, mmap=True)
    assert large.shape == (n,) and bytes(large[-3:].tolist()) == b"abc"


def several_blocks(path, strategy, save):
    """Files of several blocks, tensors that lie in two of them, and dtypes that torch itself must write."""
    torch.manual_seed(int(save))
    model = nn.Sequential(*(nn.Linear(1000, 1200) for _ in range(4)))
    model.register_buffer("complex", torch.randn(5, 3, dtype=torch.complex64))
    shardwise.fully_shard(model, strategy=strategy)
    if save:
        checkpoint.save(path, models=[model])
        checkpoint.verify(path)
    else:
        model.complex.zero_()
        checkpoint.load(path, models=[model])
    return whole(model)


def test_several_blocks(tmp_path):
    saved = run(2, several_blocks, tmp_path / "a", "zero3", True)[0]
    assert (tmp_path / "a" / "__0_0.distcp").stat().st_size > 1 << 23
    for size, strategy in ((3, "zero3"), (1, "ddp")):
        assert_same(run(size, several_blocks, tmp_path / "a", strategy, False)[-1], saved)
    data = bytearray((tmp_path / "a" / "__1_0.distcp").read_bytes())
    data[-1000] ^= 1
    (tmp_path / "a" / "__1_0.distcp").write_bytes(data)
    with pytest.raises(CheckpointError, match="__1_0"):
        checkpoint.verify(tmp_path / "a")


# --- what is refused ---------------------------------------------------------------------------------
def manifest_of(path):
    return json.loads((path / "shardwise.json").read_text())


def put_manifest(path, outer):
    outer["crc32"] = zlib.crc32(json.dumps(outer["shardwise"], sort_keys=True).encode())
    (path / "shardwise.json").write_text(json.dumps(outer))


def agree(path, name):
    """Let the manifest say of a changed file that it is as it should be."""
    outer = manifest_of(path)
    data = (path / name).read_bytes()
    outer["shardwise"]["files"][name] = {"size": len(data), "crc32": [zlib.crc32(data)]}
    put_manifest(path, outer)


def cut_off(path):
    file = path / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-7])
    return path, "__1_0.distcp"


def bit_flipped(path):
    file = path / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    return path, "__0_0.distcp"


def file_missing(path):
    (path / "rank_1.pt").unlink()
    return path, "rank_1.pt"


def manifest_cut(path):
    file = path / "shardwise.json"
    file.write_text(file.read_text()[:-20])
    return path, "shardwise.json"


def manifest_changed(path):
    file = path / "shardwise.json"
    file.write_text(file.read_text().replace('"world_size": 2', '"world_size": 3'))
    return path, "shardwise.json"


def manifest_missing(path):
    (path / "shardwise.json").unlink()
    return path, "no shardwise.json"


def newer(path):
    outer = manifest_of(path)
    outer["shardwise"]["format"] = 99
    put_manifest(path, outer)
    return path, "pip install --upgrade"


def not_there(path):
    return path.with_name("elsewhere"), "there are a"


def index_damaged(path):
    (path / ".metadata").write_bytes(b"\x80\x04nonsense")
    agree(path, ".metadata")
    return path, ".metadata"


def index_of_other_files(path):
    index = pickle.loads((path / ".metadata").read_bytes())
    next(iter(index.storage_data.values())).relative_path = "../../secret"
    (path / ".metadata").write_bytes(pickle.dumps(index))
    agree(path, ".metadata")
    return path, ".metadata"


class Payload:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def planted_in_index(path):
    (path / ".metadata").write_bytes(pickle.dumps(Payload(path / "ran")))
    agree(path, ".metadata")
    return path, ".metadata"


def planted_in_state(path):
    torch.save({"state": Payload(path / "ran"), "extra": {}, "optimizers": []}, path / "state.pt")
    agree(path, "state.pt")
    return path, "state.pt"


def planted_in_tensors(path):
    torch.save(Payload(path / "ran"), path / "bad")
    bad, data = (path / "bad").read_bytes(), (path / "__0_0.distcp").read_bytes()
    index = pickle.loads((path / ".metadata").read_bytes())
    for key, info in index.storage_data.items():
        if key.fqn == "model.head.weight" and info.relative_path == "__0_0.distcp":
            info.offset, info.length = len(data), len(bad)
    (path / ".metadata").write_bytes(pickle.dumps(index))
    (path / "__0_0.distcp").write_bytes(data + bad)
    agree(path, ".metadata")
    agree(path, "__0_0.distcp")
    return path, "cannot be read"


def refuses(path):
    model, opt = build("zero3", seed=5)
    before = whole(model)
    text = failure(checkpoint.load, path, models=[model], optimizers=[opt], verify=True)
    assert_same(whole(model), before)
    assert len(opt.state) == 0
    step(model, opt, 0)  # and everybody can go on
    return text


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "a"
    run(2, trained, path, "zero3")
    return path


@pytest.mark.parametrize(
    "harm",
    [
        cut_off, bit_flipped, file_missing, manifest_cut, manifest_changed, manifest_missing, newer, not_there,
        index_damaged, index_of_other_files, planted_in_index, planted_in_state,
    ],
)  # fmt: skip
def test_a_bad_checkpoint_is_refused_on_every_rank_before_anything_changes(tmp_path, good, harm):
    path = tmp_path / "a"
    os.makedirs(path)
    for file in good.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    path, named = harm(path)
    for text in run(2, refuses, path):
        assert named in text
        assert "fix:" in text
    assert not (path / "ran").exists()


def in_part(bad, good, strategy):
    """A load that fails when some values are in place: the model is of no use until another load is complete."""
    model, opt = build(strategy, seed=5)
    step(model, opt, 0)
    texts = [failure(checkpoint.load, bad, models=[model], optimizers=[opt])]
    texts += [failure(loss_of, model, batch(0, rank())), failure(checkpoint.save, f"{bad}2", models=[model])]
    texts += [failure(checkpoint.save_model, model, f"{bad}3"), failure(checkpoint.full_state_dict, model)]
    checkpoint.load(good, models=[model], optimizers=[opt])
    again, again_opt = build(strategy, seed=6)
    checkpoint.load(good, models=[again], optimizers=[again_opt])
    assert step(model, opt, 2) == step(again, again_opt, 2)
    assert_same(whole(model), whole(again))
    return texts


@pytest.mark.parametrize(
    "strategy", ["ddp", "zero1", "zero3", "zero3,offload_params=nvme,offload_optimizer=nvme", "none"]
)
def test_a_model_that_was_loaded_in_part_is_refused(tmp_path, good, strategy):
    if "nvme" in strategy:
        strategy += f",nvme_path={tmp_path}"
    path = tmp_path / "a"
    os.makedirs(path)
    for file in good.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    bit_flipped(path)
    for first, *others in run(2, in_part, path, good, strategy):
        assert "__0_0.distcp" in first and "wrong checksum" in first
        assert all("could not be loaded to its end" in text and "fix:" in text for text in others)


def refuses_tensors(path):
    model, opt = build("none")
    return failure(checkpoint.load, path, models=[model], optimizers=[opt])


def test_code_among_the_tensors_is_not_run(tmp_path):
    run(1, trained, tmp_path / "a", "zero3")
    path, named = planted_in_tensors(tmp_path / "a")
    text = run(1, refuses_tensors, path)[0]
    assert named in text
    assert "Weights only load failed" in text
    assert not (path / "ran").exists()


def misfits(path):
    model, opt = build("zero2", d=13, layers=2, vocab=37)
    before = whole(model)
    text = failure(checkpoint.load, path, models=[model], optimizers=[opt])
    assert_same(whole(model), before)
    loaded = checkpoint.load(path, models=[model], optimizers=[opt], strict=False)
    after = whole(model)
    assert torch.equal(after["embed.weight"], before["embed.weight"])  # of another shape: left alone
    step(model, opt, 0)
    return text, loaded.differences, after


def test_what_does_not_fit_is_listed_and_may_be_left_out(tmp_path):
    saved = run(2, trained, tmp_path / "a", "zero3")[0]
    for text, differences, after in run(2, misfits, tmp_path / "a"):
        assert "'blocks.2.up.weight' is in the checkpoint only" in text
        assert "'embed.weight' has shape (31, 13) in the checkpoint, not (37, 13)" in text
        assert "more" in text
        assert "strict=False" in text
        assert len(differences) > 10
        assert torch.equal(after["blocks.1.up.weight"], saved["blocks.1.up.weight"])


def untied_into_tied(path):
    tied, untied = make(tied=True), make(seed=1)
    checkpoint.save(f"{path}1", models=[tied])
    checkpoint.save(f"{path}2", models=[untied])
    text = failure(checkpoint.load, f"{path}2", models=[tied])
    checkpoint.load(f"{path}1", models=[untied])
    assert torch.equal(untied.head.weight, tied.embed.weight)
    return text


def test_tied_and_untied(tmp_path):
    assert "'head.weight' and 'embed.weight' are tied" in run(1, untied_into_tied, tmp_path / "a")[0]


class Strange:
    pass


def state_kinds(path):
    good = {
        "numbers": [1, 2.5, True, None, 1 << 80, complex(1, 2)], "text": ("a", b"b"), "nest": {1: {"x": {3, 4}}},
        "tensor": torch.arange(10)[3:5], "array": np.arange(4, dtype=np.int16).reshape(2, 2),
        "number": np.float64(0.5), "half": torch.ones(2, dtype=torch.bfloat16), "dtype": torch.float16,
    }  # fmt: skip
    checkpoint.save(path, state=good, rank_state={"mine": rank()})
    loaded = checkpoint.load(path)
    assert loaded.state.keys() == good.keys()
    for key in ("numbers", "text", "nest", "number", "dtype"):
        assert loaded.state[key] == good[key]
        assert type(loaded.state[key]) is type(good[key])
    assert torch.equal(loaded.state["tensor"], good["tensor"])
    assert loaded.state["tensor"].untyped_storage().nbytes() == 16  # not the storage it was a view of
    assert np.array_equal(loaded.state["array"], good["array"])
    assert loaded.state["array"].dtype == np.int16
    assert loaded.rank_state == {"mine": rank()}
    bad = [{"custom": [{"a": 1}, {"thing": Strange()}]}, {"fn": print}, {"lambda": {"f": lambda: 1}}]
    return [failure(checkpoint.save, path, state=b) for b in bad] + [str(checkpoint.load(path).state["text"])]


def test_small_state_and_what_it_cannot_hold(tmp_path):
    for texts in run(2, state_kinds, tmp_path / "a"):
        assert "state['custom'][1]['thing']" in texts[0]
        assert "Strange" in texts[0]
        assert "state['fn']" in texts[1]
        assert "state['lambda']['f']" in texts[2]
        assert texts[3] == "('a', b'b')"  # the refused saves left the older one alone
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert [r["mine"] if r else None for r in run(3, read_rank_state, tmp_path / "a")] == [0, 1, None]


def read_rank_state(path):
    return checkpoint.load(path).rank_state


def one_rank_fails(path, how):
    model = make()
    checkpoint.save(path, models=[model], state={"n": 1})
    if how == "files":
        return failure(checkpoint.save, path, models=[model], state={"n": 2}, files_from=fails_on_one)
    if how == "state":
        return failure(checkpoint.save, path, models=[model], rank_state={"x": Strange()} if rank() else {})
    if how == "models":
        return failure(checkpoint.save, path, models=[model, nn.Linear(2, 2 + rank())][: 1 + rank()])
    return failure(checkpoint.save, Path(path) / "state.pt" / "x", models=[model])


def fails_on_one(directory):
    (directory / f"note{rank()}.txt").write_text("hello")
    if rank() == 1:
        raise OSError(28, "No space left on device", str(directory / "note1.txt"))


@pytest.mark.parametrize("how", ["files", "state", "models", "place"])
def test_if_one_rank_cannot_save_all_say_so_and_the_older_one_stays(tmp_path, how):
    texts = run(2, one_rank_fails, tmp_path / "a", how)
    assert all(texts)
    if how == "files":
        assert all("No space left" in t and "note1.txt" in t for t in texts)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    checkpoint.verify(tmp_path / "a")
    assert checkpoint.load(tmp_path / "a", models=[make(seed=1)]).state == {"n": 1}


# --- the directory -----------------------------------------------------------------------------------
def with_files(directory):
    if rank() == 0:
        (directory / "sub").mkdir()
        (directory / "sub" / "note.txt").write_text("hello")


def test_an_older_checkpoint_is_replaced_and_strangers_stay(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    (path / "args.json").write_text("mine")
    assert checkpoint.save(path, state={"n": 1}, files_from=with_files) == path
    assert (path / "args.json").read_text() == "mine"
    assert "sub/note.txt" in checkpoint.read_manifest(path).files
    checkpoint.save(path, state={"n": 2})
    assert (path / "args.json").read_text() == "mine"
    assert not (path / "sub").exists()  # part of the older checkpoint
    assert checkpoint.load(path).state == {"n": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_another_tools_checkpoint_is_not_overwritten(tmp_path):
    dcp.save({"x": torch.ones(3)}, checkpoint_id=tmp_path / "a", no_dist=True)
    with pytest.raises(CheckpointError, match="another tool"):
        checkpoint.save(tmp_path / "a", state={"n": 1})
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="in the way"):
        checkpoint.save(tmp_path / "file", state={"n": 1})


def test_a_kill_at_any_moment_leaves_a_loadable_checkpoint(tmp_path):
    path = tmp_path / "checkpoint_0"
    checkpoint.save(path, state={"n": 1})
    checkpoint.save(tmp_path / "new", state={"n": 2})
    half = tmp_path / "checkpoint_0.tmp-00000000"  # killed while it was being written
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    assert checkpoint.load(path).state == {"n": 1}
    assert checkpoint.latest(tmp_path) is not None
    path.rename(tmp_path / "checkpoint_0.old-00000001")  # killed between the two renames
    assert checkpoint.load(path).state == {"n": 1}
    (tmp_path / "new").rename(tmp_path / "checkpoint_0.tmp-00000002")
    assert checkpoint.load(path).state == {"n": 2}
    assert checkpoint.latest(tmp_path) == path
    checkpoint.save(path, state={"n": 3})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_0"]
    assert checkpoint.load(path).state == {"n": 3}


def test_numbers_latest_and_limit(tmp_path):
    root = tmp_path / "checkpoints"
    assert checkpoint.latest(root) is None
    for i in range(12):
        path = checkpoint.next_path(root)
        assert path.name == f"checkpoint_{i}"
        checkpoint.save(path, state={"n": i}, info={"step": i})
    (root / "checkpoint_12").mkdir()  # never became complete
    (root / "notes").mkdir()
    assert checkpoint.latest(root) == root / "checkpoint_11"
    assert checkpoint.next_path(root).name == "checkpoint_13"
    gone = checkpoint.prune(root, 2)
    assert len(gone) == 10
    assert sorted(p.name for p in root.iterdir()) == ["checkpoint_10", "checkpoint_11", "checkpoint_12", "notes"]
    checkpoint.prune(root, 1)
    assert checkpoint.load(checkpoint.latest(root)).manifest.info == {"step": 11}
    outer = manifest_of(root / "checkpoint_11")
    outer["shardwise"]["format"] = 2
    put_manifest(root / "checkpoint_11", outer)
    with pytest.raises(CheckpointError, match="format 2"):
        checkpoint.latest(root)
    with pytest.raises(CheckpointError, match="total_limit=0"):
        checkpoint.prune(root, 0)


@pytest.mark.parametrize("harm", ["manifest", "file", "short"])
def test_latest_passes_over_what_is_not_whole_and_the_limit_keeps_what_is(tmp_path, harm):
    for i in range(4):
        checkpoint.save(tmp_path / f"checkpoint_{i}", state={"n": i})
    for i in (2, 3):
        path = tmp_path / f"checkpoint_{i}"
        if harm == "manifest":
            manifest_cut(path)
        elif harm == "file":
            (path / "state.pt").unlink()
        else:
            (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:-1])
    with pytest.warns(UserWarning, match="checkpoint_3.*the newest complete one is .*checkpoint_1"):
        assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint_1"
    with pytest.warns(UserWarning, match="checkpoint_3"):
        assert checkpoint.load(tmp_path / "latest").state == {"n": 1}
    assert checkpoint.prune(tmp_path, 1) == [tmp_path / "checkpoint_0"]
    with pytest.warns(UserWarning, match="checkpoint_2"):
        assert checkpoint.find(tmp_path / "latest") == tmp_path / "checkpoint_1"
    (tmp_path / "checkpoint_1" / "state.pt").unlink()
    with pytest.raises(CheckpointError, match="none of the checkpoints there is complete"):
        checkpoint.load(tmp_path / "latest")
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        checkpoint.load(tmp_path / "nothing" / "latest")


# --- whole models --------------------------------------------------------------------------------------
def exported(path, strategy, **kw):
    model, opt = build(strategy, tied=True)
    step(model, opt, 0)
    checkpoint.save_model(model, path, **kw)
    full, none = checkpoint.full_state_dict(model), checkpoint.full_state_dict(model, rank0_only=True)
    assert list(full) == list(model.state_dict())
    assert_same(full, whole(model))
    assert bool(none) == (rank() == 0)
    step(model, opt, 1)
    return full


@pytest.mark.parametrize("strategy", ["none", "ddp", "zero1", "zero3,param_dtype=bf16", "zero3,layout=tensor"])
def test_save_model_writes_what_safetensors_reads(tmp_path, strategy):
    size = 1 if strategy == "none" else 2
    full = run(size, exported, tmp_path / "m", strategy)[0]
    assert sorted(os.listdir(tmp_path / "m")) == ["model.safetensors"]
    read = safetensors.torch.load_file(tmp_path / "m" / "model.safetensors")
    assert_same(read, {k: v for k, v in full.items() if k != "head.weight"})
    model = make(seed=4, tied=True)
    assert safetensors.torch.load_model(model, tmp_path / "m" / "model.safetensors") == (set(), [])
    assert_same(whole(model), full)


@pytest.mark.parametrize("safe", [True, False])
def test_save_model_in_several_files(tmp_path, safe):
    run(2, exported, tmp_path / "m", "zero3")
    full = run(2, exported_in_parts, tmp_path / "m", safe)[0]
    stem, end = ("model", ".safetensors") if safe else ("pytorch_model", ".bin")
    files = sorted(p.name for p in (tmp_path / "m").glob(f"{stem}*{end}"))
    assert len(files) > 2
    assert files[0] == f"{stem}-00001-of-{len(files):05d}{end}"
    assert (tmp_path / "m" / "model.safetensors").exists() == (not safe)  # an older one of the same kind is gone
    index = json.loads((tmp_path / "m" / f"{stem}{end}.index.json").read_text())
    read = {}
    for file in files:
        path = tmp_path / "m" / file
        part = safetensors.torch.load_file(path) if safe else torch.load(path, weights_only=True)
        assert all(index["weight_map"][name] == file for name in part)
        if safe:
            assert sum(t.nbytes for t in part.values()) <= 5000 or len(part) == 1
        read.update(part)
    assert read.keys() == index["weight_map"].keys()
    if safe:
        read["head.weight"] = read["embed.weight"]
    else:
        make(tied=True).load_state_dict(read)
    assert_same({k: read[k] for k in full}, full)


def exported_in_parts(path, safe):
    return exported(path, "zero3", max_shard_size="5KB" if safe else 5000, safe_serialization=safe)


def saves_nowhere(path):
    model, _ = build("zero3")
    return failure(checkpoint.save_model, model, path), failure(checkpoint.save_model, model, "x", max_shard_size="1 X")


def test_save_model_that_cannot_write(tmp_path):
    (tmp_path / "file").write_text("x")
    for nowhere, size in run(2, saves_nowhere, tmp_path / "file"):
        assert str(tmp_path / "file") in nowhere
        assert "'1 X' is not a size" in size


def test_transformers_reads_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    checkpoint.save_model(model, tmp_path, max_shard_size="20KB")
    config.save_pretrained(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert_same(whole(again), whole(model))
    assert again.lm_head.weight is again.transformer.wte.weight


def test_world_is_one_here():
    assert world() == 1  # the tests that save in this process rely on it
