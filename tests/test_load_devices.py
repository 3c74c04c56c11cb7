"""Models on several devices of one process: the same numbers, wherever the cuts are, and both devices at work at once.

The devices are simulated ones, where two operations that race fail the test. What runs there is compared, bit for bit,
with the same model on one of them.
"""

from __future__ import annotations

import copy
import gc
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import processes
import shardwise
from ranks import run
from shardwise import device as devices
from shardwise.engine.hooks import engine_of
from shardwise.errors import DeviceError, OffloadError, UnitError
from shardwise.inference.auto_map import infer_auto_device_map
from shardwise.inference.dispatch import dispatch_model, load_checkpoint_and_dispatch
from shardwise.inference.memory import get_max_memory
from shardwise.inference.meta import init_empty_weights
from shardwise.inference.plan import Weights
from shardwise.inference.several_devices import place_on_devices
from test_load import MODELS, Odd, ids, llama, make, said, saved

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]  # the first one builds the device
on_simulated = pytest.mark.usefixtures("simulated_device")
ZERO, ONE = "sim:0", "sim:1"


def on_one(function: Any, *args: Any) -> Any:
    return run(1, function, *args, device="sim")[0]


def example(name: str) -> Any:
    model = make(name)
    if name == "mixtral":  # the other way asks for a kernel that the simulated device has not
        model.set_experts_implementation("eager")
    return model


def loaded(name: str, folder: str, *args: Any, **kw: Any) -> Any:
    model = shardwise.load(folder, *args, **kw)
    if name == "mixtral":
        model.set_experts_implementation("eager")
    return model


def arguments(name: str, rows: int = 2) -> dict[str, torch.Tensor]:
    found = {"input_ids": ids(rows=rows)}
    return found | ({"decoder_input_ids": ids(1, rows=rows)} if name == "t5" else {})


def logits(model: Any, name: str, rows: int = 2) -> torch.Tensor:
    with torch.no_grad():
        return model(**arguments(name, rows)).logits


# --- the same numbers, wherever the cuts are ------------------------------------------------------------
MAPS: dict[str, list[Any]] = {
    "llama": [
        "auto", "sequential",
        {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "disk", "model.layers.2": 1, "": "cpu"},
        {"model.layers.0": 1, "model.layers.1": 0, "model.layers.1.mlp": 1, "model.norm": 0, "": 1},  # cut in a block
    ],
    "gpt2": [  # tied: its head is where its table is; words and positions are added
        "auto", {"transformer.wte": 0, "transformer.wpe": 1, "transformer.h.1": 0, "transformer.h.2": "cpu", "": 1},
        {"transformer": 1, "transformer.h.3": 0, "lm_head": 0},
    ],
    "t5": [  # an encoder that is called by itself, and a table for both halves and the head
        "balanced", {"encoder": 1, "decoder.block.1": "disk", "": 0, "decoder.block.2": 1},
        {"encoder": 0, "decoder": 1, "shared": 0, "lm_head": 1},
    ],
    "mixtral": ["auto", {"model.layers.1.self_attn": 1, "model.layers.2": "disk", "model.layers.3": 1, "": 0}],
}  # fmt: skip


def everywhere(name: str) -> None:
    plain = example(name)
    with tempfile.TemporaryDirectory() as folder:
        saved(plain, Path(folder))
        state = plain.state_dict()
        plain = plain.to(ZERO)
        tokens = said(plain, ids().to(ZERO))
        expected = plain(**{k: v.to(ZERO) for k, v in arguments(name).items()}).logits.cpu()
        size = sum(p.nbytes for p in plain.parameters())
        for device_map in MAPS[name]:
            kw: dict[str, Any] = {}
            if device_map == "sequential":  # device 0 is full before device 1 has anything
                kw = {"max_memory": {0: size * 8 // 10, 1: size, "cpu": 0}, "length": 8}
            model = loaded(name, folder, device_map, **kw)
            found = {str(p.device) for p in model.parameters()}
            assert found == {ZERO, ONE}, (device_map, found)
            assert torch.equal(logits(model, name), expected), device_map  # on the host, as the inputs
            out = said(model, ids().to(ZERO))
            assert str(out.device) == ZERO and torch.equal(out, tokens), device_map
            assert {k: v.cpu() for k, v in model.state_dict().items()}.keys() == state.keys()
            assert all(torch.equal(v.cpu(), state[k]) for k, v in model.state_dict().items()), device_map
            assert all("forward" not in vars(m) for m in model.modules())
            if device_map == MAPS[name][-1]:
                twin = copy.deepcopy(model)
                del model
                assert torch.equal(said(twin, ids().to(ZERO)), tokens), device_map


@on_simulated
@pytest.mark.parametrize("name", MAPS)
def test_tokens_are_those_of_one_device_wherever_the_cuts_are(name):
    assert name in MODELS
    on_one(everywhere, name)


class Reads(nn.Module):
    """Its head is the table, read past the module that has it; code between blocks adds and multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 48)
        self.front = nn.Sequential(nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 48))
        self.blocks = nn.ModuleList(nn.Linear(48, 48) for _ in range(3))
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.front(self.table(x))
        for block in self.blocks:
            x = x + block(x) * self.scale
        return x @ self.table.weight.T


def of_any_kind() -> None:
    for kind, maps in (
        (
            Odd,
            [
                {"blocks.0": 0, "blocks.1": 1, "blocks.3": "cpu", "shift": 0, "scale": 0, "": 0},
                {"table": 1, "blocks.2.0": 0, "": 1},
            ],
        ),
        (Reads, [{"front.0": 0, "front.2": 1, "blocks.1": 1, "": 0}, {"front.0": "disk", "blocks.0": 0, "": 1}]),
    ):
        torch.manual_seed(0)
        plain = kind().eval().to(ZERO)
        with torch.no_grad():
            expected = plain((ids() % 50).to(ZERO))
            for device_map in maps:
                with tempfile.TemporaryDirectory() as folder:
                    model = dispatch_model(copy.deepcopy(plain), device_map, offload_dir=folder)
                    assert len({p.device for p in model.parameters()}) == 2
                    out = model((ids() % 50).to(ONE))
                    assert str(out.device) == ONE and torch.equal(out.cpu(), expected.cpu()), device_map


@on_simulated
def test_code_between_modules_finds_what_it_takes_on_one_device():
    on_one(of_any_kind)


def gradients() -> None:
    torch.manual_seed(0)
    plain = Reads().eval().to(ZERO)
    model = dispatch_model(copy.deepcopy(plain), {"front": 0, "blocks.0": 1, "blocks.1": 0, "blocks.2": 1, "": 0})
    grads = []
    for one in (plain, model):
        x = torch.randn(2, 3, 48, generator=torch.Generator().manual_seed(1)).to(ZERO).requires_grad_()
        handle = one.table.register_forward_hook(lambda module, args, out, x=x: x)
        one((ids(length=3) % 50).to(ZERO)).square().sum().backward()
        handle.remove()
        grads.append(x.grad.cpu())
    assert torch.equal(*grads)


@on_simulated
def test_gradients_of_inputs_come_back_over_both():
    on_one(gradients)


# --- Accelerate's words ------------------------------------------------------------------------------------
def dispatched() -> None:
    plain = example("llama").to(ZERO)
    expected = said(plain, ids().to(ZERO))
    cut = {"model.embed_tokens": 1, "model.layers.0": 1, "model.layers.1": "cpu", "model.layers.2": "disk", "": 0}
    with tempfile.TemporaryDirectory() as folder:
        model = dispatch_model(example("llama"), cut, offload_dir=f"{folder}/away")
        assert [str(model.shardwise_plan.places[f"model.layers.{k}"]) for k in (1, 2, 3)] == [ONE, ONE, ZERO]
        assert torch.equal(said(model, ids().to(ZERO)), expected)
        for name in ("llama", "t5"):  # a map of Accelerate's, by its own function
            model, size = example(name), sum(p.nbytes for p in example(name).parameters())
            cut = infer_auto_device_map(
                model, {0: size * 7 // 10, 1: size // 2, "cpu": size // 5}, list(model._no_split_modules)
            )
            model, alone = dispatch_model(model, cut, offload_dir=f"{folder}/{name}"), example(name).to(ZERO)
            assert {0, 1} < {*cut.values()} and "forward" not in vars(model)
            assert torch.equal(said(model, ids()), said(alone, ids().to(ZERO)).cpu())
        model = dispatch_model(example("llama"), {"model.layers.3": 1, "": "cpu"}, main_device=0)
        assert str(model.shardwise_plan.places["model.layers.0"]) == ZERO
        assert torch.equal(said(model, ids().to(ZERO)), expected)

        saved(plain, Path(folder))
        with init_empty_weights():
            empty = example("llama")
        kw = {"max_memory": {0: "10MB", 1: "14MB"}, "no_split_module_classes": ["LlamaDecoderLayer"]}
        model = load_checkpoint_and_dispatch(empty, folder, "auto", **kw)
        on = [list(model.hf_device_map.values()).count(f"sim:{k}") for k in range(2)]
        assert 0 < on[0] < on[1]  # in proportion
        assert torch.equal(said(model, ids().to(ZERO)), expected)
        with pytest.raises(UnitError, match="several devices"):
            model.to(ONE)
        with pytest.raises(UnitError, match="several devices"):
            model.model.half()
        for device_map, error in (
            ({"model.layers.0": 0, "": 2}, "sim:2"),
            ({"model.layers.0": "cuda:0", "": 1}, "cuda"),
        ):
            with pytest.raises(DeviceError, match=error):
                shardwise.load(folder, device_map)
        with pytest.raises(OffloadError, match="max_memory is about 3"):
            shardwise.load(folder, max_memory={3: "1GB"})
        with pytest.raises(OffloadError, match=r"takes .* of sim:1"):
            shardwise.load(folder, {"model.layers.0": 0, "": 1}, max_memory={0: "1GB", 1: "1KB"})
        with pytest.raises(OffloadError, match=r"(?s)sim:\d: .*at least"):
            shardwise.load(folder, max_memory={0: "50KB", 1: "50KB"})
        assert torch.equal(said(shardwise.load(folder, max_memory={1: "1GB"}), ids().to(ONE)).cpu(), expected.cpu())


@on_simulated
def test_dispatching_and_what_cannot_be_done():
    on_one(dispatched)


class Mixes(Reads):
    _no_split_modules = ("Linear",)  # which says that outputs of blocks may stay where they are. They may not.


def mixed_up() -> str:
    model = dispatch_model(Mixes().eval(), {"blocks.1": 1, "": 0})
    with pytest.raises(RuntimeError) as raised, torch.no_grad():
        model((ids() % 50).to(ZERO))
    return "\n".join(raised.value.__notes__)


@on_simulated
def test_code_that_takes_tensors_of_two_devices_is_told_why():
    assert "several devices" in on_one(mixed_up)


# --- which devices a rank has --------------------------------------------------------------------------------
def test_ranks_deal_out_the_devices_of_their_host(monkeypatch):
    monkeypatch.setattr(devices, "accelerator", lambda: "xpu")
    monkeypatch.setattr(devices, "count", lambda: 5)
    monkeypatch.setattr(devices, "memory", lambda device: (1 << 30, 1 << 30))
    taken = []
    for local in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        taken += [d.index for d in devices.of_this_rank(devices.of_rank(), 2)]
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # so that maps which are made from what is free are disjoint, too
        assert [*get_max_memory()] == [*range(local, 5, 2), "cpu"]
    assert taken == [0, 2, 4, 1, 3]
    assert devices.of_this_rank(torch.device("xpu", 0), 2) == [torch.device("xpu", 0)]  # a rank that was given another
    assert devices.of_this_rank(torch.device("cpu"), 2) == [torch.device("cpu")]
    both = get_max_memory()["cpu"]
    monkeypatch.delenv("LOCAL_RANK")
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert [*get_max_memory()] == [0, 1, 2, 3, 4, "cpu"] and both < get_max_memory()["cpu"] * 2 // 3
    assert [d.index for d in devices.of_this_rank(torch.device("xpu", 3), 1)] == [3, 0, 1, 2, 4]


def of_two_ranks(folder: str) -> None:
    import simulated_device

    simulated_device.install()
    world = shardwise.init()
    with init_empty_weights(include_buffers=False):
        model = Reads()
    model = shardwise.load(model, checkpoint=folder)
    print({str(p.device) for p in model.parameters()} == {f"sim:{world.rank}"})


@on_simulated
def test_each_rank_has_devices_of_its_own(tmp_path):
    torch.save(Reads().state_dict(), tmp_path / "weights.pt")
    port = processes.free_port()
    started = [
        processes.fork(
            of_two_ranks, str(tmp_path / "weights.pt"),
            number=r, environment=os.environ | processes.rank_environment(r, 2, port),
        )[0]
        for r in range(2)
    ]  # fmt: skip
    for process in started:
        code, out, err = process.finish()
        assert code == 0 and out.strip() == "True", err


def units(*sizes: int) -> list[Weights]:
    return [Weights(f"u{k}", size) for k, size in enumerate(sizes)]


def rows(plan: Any) -> list[list[str]]:
    return [list(its.homes) for its in plan.plans.values()]


def test_plans_of_several_devices():
    a, b, c = (torch.device("xpu", k) for k in range(3))
    even = place_on_devices(units(*[10] * 6), {a: 1000, b: 1000, c: 1000}, 0, ahead=1)
    assert rows(even) == [["u0", "u1"], ["u2", "u3"], ["u4", "u5"]] and even.places["u5"] == c
    filled = place_on_devices(units(*[10] * 6), {a: 45, b: 1000, c: 1000}, 0, ahead=1, order="sequential")
    assert rows(filled) == [["u0", "u1", "u2", "u3"], ["u4", "u5"]]
    low = place_on_devices(units(*[10] * 6), {a: 1000, b: 1000, c: 1000}, 0, ahead=1, order="balanced_low_0")
    assert rows(low) == [["u0", "u1", "u2"], ["u3", "u4", "u5"]] and a not in low.plans
    uneven = place_on_devices(units(*[10] * 8), {a: 300, b: 100}, 0, ahead=1)
    assert rows(uneven) == [[f"u{k}" for k in range(6)], ["u6", "u7"]]
    assert place_on_devices(units(50, 10, 10), {a: 55, b: 30}, 0, ahead=1).total("nvme") == 0
    # A cache is where its blocks are, and takes from each device; what is fixed, from all.
    cached = place_on_devices(units(*[10] * 8), {a: 100, b: 100}, 0, ahead=1, fixed=20, cache=80)
    assert [its.beside for its in cached.plans.values()] == [60, 60]
    assert all(its.device <= 100 for its in cached.plans.values())
    # What does not fit streams on all of them, within each one's memory and the host's.
    streamed = place_on_devices(units(*[10] * 20), {a: 80, b: 60}, 35, ahead=1)
    assert streamed.total("cpu") == 30 and streamed.total("device") > 0 and len(rows(streamed)) == 2
    assert streamed.plans[a].device <= 80 and streamed.plans[b].device <= 60
    assert all(its.streaming for its in streamed.plans.values())
    assert str(streamed).count("disk") == 2 and "xpu:0" in str(streamed) and "xpu:1" in str(streamed)


# --- pieces ----------------------------------------------------------------------------------------------------
def by_pieces(name: str) -> None:
    """Pieces compute as their rows do by themselves; caches, beams and padding are those of the whole batch."""
    plain = example(name).to(ZERO)
    with tempfile.TemporaryDirectory() as folder:
        saved(plain, Path(folder))
        model = loaded(name, folder, "auto", micro_batches=3)
        kw = {k: v.to(ZERO) for k, v in arguments(name, 5).items()}
        with torch.no_grad():
            alone = [plain(**{k: v[a:b] for k, v in kw.items()}) for a, b in ((0, 1), (1, 3), (3, 5))]
            out = model(**kw)
            assert torch.equal(out.logits, torch.cat([one.logits for one in alone]))
            torch.testing.assert_close(out.logits, plain(**kw).logits)
            (keys, *_), (parts, *_) = (
                out.past_key_values,
                zip(*(list(one.past_key_values) for one in alone), strict=True),
            )
            assert torch.equal(keys[0].cpu(), torch.cat([part[0] for part in parts]).cpu())
        block, calls = next(m for m in model.modules() if type(m).__name__ in model._no_split_modules), []

        def fails(module: Any, args: Any) -> None:
            calls.append(len(args[0]))
            if len(calls) == 2:
                raise ValueError("in the second piece")

        handle = block.register_forward_pre_hook(fails)
        with pytest.raises(ValueError, match="second piece"), torch.no_grad():
            model(**kw)
        handle.remove()
        assert calls == [1, 2]
        mask = torch.ones(5, 7, dtype=torch.long)
        mask[1, :3] = mask[4, :2] = 0
        for extra in ({}, {"num_beams": 2}, {"attention_mask": mask.to(ZERO)}):
            assert torch.equal(said(model, ids(rows=5).to(ZERO), **extra), said(plain, ids(rows=5).to(ZERO), **extra))


@on_simulated
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_pieces_are_what_their_rows_are(name):
    on_one(by_pieces, name)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_pieces_on_the_cpu(tmp_path, name, caplog):
    model = make(name)
    saved(model, tmp_path)
    pieces = shardwise.load(tmp_path, micro_batches=2)
    with torch.no_grad():
        for rows_ in (4, 5, 1):
            x, cut = ids(rows=rows_), rows_ // 2
            alone = [model(part).logits for part in (x[:cut], x[cut:]) if len(part)]
            assert torch.equal(pieces(x).logits, torch.cat(alone))
    assert torch.equal(said(pieces, ids(rows=4)), said(model, ids(rows=4)))
    for kw in ({"output_hidden_states": True}, {"labels": ids(rows=4)}):  # a loss is of all rows: it runs whole
        caplog.clear()
        with torch.no_grad():
            one, other = pieces(ids(rows=4), **kw), model(ids(rows=4), **kw)
        assert ("runs whole" in caplog.text) == ("labels" in kw)
        assert one.keys() == other.keys()
        torch.testing.assert_close(one.logits, other.logits)
        assert one.loss is None or torch.equal(one.loss, other.loss)
    with pytest.raises(UnitError, match="bring them again"):
        shardwise.load(tmp_path, {"": "disk"}, micro_batches=2)
    with pytest.raises(UnitError, match="micro_batches=0"):
        shardwise.load(tmp_path, micro_batches=0)


class Rows(Reads):
    """Counts its calls; its outputs are a nest."""

    calls = 0

    def forward(self, x: torch.Tensor, shift: torch.Tensor, scale: float = 2.0, lone: bool = False) -> Any:
        type(self).calls += 1
        y = super().forward(x) + shift
        return {"y": y, "z": (y * scale, None), "n": 3, **({"mean": y.mean()} if lone else {})}


def test_pieces_of_any_module(tmp_path):
    torch.manual_seed(0)
    model = Rows().eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    with init_empty_weights(include_buffers=False):
        empty = Rows()
    pieces = shardwise.load(empty, checkpoint=tmp_path / "weights.pt", micro_batches=2)
    x, shift = ids(rows=4) % 50, torch.randn(4, 1, 1)
    for lone, calls in ((False, 2), (True, 2), (True, 1), (False, 2)):  # found out once
        with torch.no_grad():
            expected = model(x, shift, lone=lone)
            Rows.calls = 0
            found = pieces(x, shift=shift, lone=lone)
        assert Rows.calls == calls and found.keys() == expected.keys() and found["n"] == 3 and found["z"][1] is None
        torch.testing.assert_close(found, expected)


def overlap(folder: str, mask: bool) -> dict[str, list[bool]]:
    """While device 0 computes a piece, has device 1 ended the one before? Nothing runs here before it is waited for."""
    torch.sim.configure(check="count", patience_ms=60_000)
    try:
        found = {}
        for count in (1, 2):
            model = shardwise.load(folder, "auto", micro_batches=count)
            tokens = ids(rows=4).to(ZERO)
            kw = {"attention_mask": torch.ones_like(tokens)} if mask else {}
            on_zero = [m for m in model.model.layers if str(next(m.parameters()).device) == ZERO]
            assert 0 < len(on_zero) < len(model.model.layers)
            ended: list[torch.Event] = []  # of the first piece, on device 1
            seen: list[bool] = []

            def last(module: Any, args: Any, out: Any, ended: Any = ended) -> None:
                ended.append(devices.mark(torch.device(ONE)))

            def first(module: Any, args: Any, out: Any, ended: Any = ended, seen: Any = seen) -> None:
                if ended:  # the last block on device 0 of the second piece: device 0 alone is waited for
                    devices.mark(torch.device(ZERO)).synchronize()
                    seen.append(ended[0].query())

            model.lm_head.register_forward_hook(last)
            on_zero[-1].register_forward_hook(first)
            with torch.no_grad():
                for _ in range(3 - count):
                    out = model(tokens, **kw).logits
            out.cpu()
            found[str(count)] = seen
        return found
    finally:
        torch.sim.configure(check="count")


@on_simulated
@pytest.mark.parametrize("mask", [False, True])
def test_both_devices_have_work_at_once(tmp_path, mask):
    """Two pieces: device 0 has ended the second one before device 1 has begun with the first, or the host waited.

    Two forwards instead, each whole: the outputs of the first have come back to device 0 by then.
    """
    saved(make("llama"), tmp_path)
    assert on_one(overlap, str(tmp_path), mask) == {"1": [True], "2": [False]}


def by_itself(folder: str) -> tuple[int, int]:
    """How many pieces a large and a small batch have, if nobody says."""
    model = shardwise.load(folder, "auto")
    seen = []
    model.model.norm.register_forward_hook(lambda module, args, out: seen.append(len(out)))
    with torch.no_grad():
        model(ids(rows=6, length=400).to(ZERO))
        large = len(seen)
        model(ids(rows=6).to(ZERO))
    assert sum(seen[:large]) == 6
    return large, len(seen) - large


@on_simulated
def test_large_batches_run_in_pieces_by_themselves(tmp_path):
    saved(make("llama"), tmp_path)
    assert on_one(by_itself, str(tmp_path)) == (4, 1)


def streamed_on_both(folder: str) -> None:
    """Units of the disk and of host memory come to the device of their neighbours, within each device's memory."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval().to(ZERO)
    size = sum(p.nbytes for p in plain.parameters())
    limits = {0: size * 4 // 10, 1: size * 4 // 10, "cpu": size // 10}
    tokens = ids().to(ZERO)
    with torch.no_grad():
        expected = plain(tokens).logits
    del plain
    gc.collect()
    before = [torch.sim.memory_allocated(k) for k in range(2)]
    for k in range(2):
        torch.sim.reset_peak_memory_stats(k)
    model = shardwise.load(folder, "auto", max_memory=limits, batch=2, length=16)
    plan = model.shardwise_plan
    assert {*plan.homes.values()} == {"device", "cpu", "nvme"} and len(plan.plans) == 2, plan
    assert all(its.device <= size * 4 // 10 for its in plan.plans.values())
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(model(tokens).logits, expected)
    peaks = [torch.sim.max_memory_allocated(k) - before[k] for k in range(2)]
    assert all(size // 5 < peak <= limits[k] for k, peak in enumerate(peaks)), (peaks, str(plan))
    homes = {id(u.home) for u in engine_of(model).units}
    assert len(homes) == 2


@on_simulated
def test_weights_stream_to_both_devices(tmp_path):
    saved(llama(num_hidden_layers=12), tmp_path)
    on_one(streamed_on_both, str(tmp_path))
