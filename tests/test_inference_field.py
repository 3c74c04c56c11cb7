"""What transformers, peft and diffusers do with models that run from files, and what their users hand over."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import shardwise
from models import rank
from ranks import run
from shardwise.errors import CheckpointError, OffloadError, UnitError
from shardwise.inference.dispatch import cpu_offload, dispatch_model, load_checkpoint_and_dispatch
from shardwise.inference.dispatch import load_checkpoint_in_model as load_in
from shardwise.inference.offloaded import offload_state_dict
from shardwise.inference.placing import set_module_tensor_to_device

SIM = "sim:0"


class Net(nn.Module):
    """Blocks, a normalisation that learns from what it sees, and a way in past ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(3))
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(self.norm(x))

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.blocks[0](x))


def make() -> Net:
    torch.manual_seed(3)
    net = Net()
    net.norm.running_mean.uniform_()
    return net


def some(rows: int = 5) -> torch.Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(1))


# --- dispatching ------------------------------------------------------------------------------------------------
HALF = {"first": "cpu", "blocks": "disk", "norm": "cpu", "last": "disk"}


@pytest.mark.parametrize("kind", ["dat", "dat of the index", "safetensors", "renamed", "another dtype"])
def test_what_an_offload_folder_has_already_is_read_there(tmp_path, kind):
    model, expected = make().eval(), make().eval()
    away = {n: p.detach() for n, p in model.named_parameters() if n.split(".")[0] in ("blocks", "last")}
    index: dict | None = None
    if kind.startswith("dat"):
        offload_state_dict(tmp_path, away)
        if "index" in kind:
            index = json.loads((tmp_path / "index.json").read_text())
    else:
        file = tmp_path / "weights.safetensors"
        stored = {f"old.{n}" if kind == "renamed" else n: p for n, p in away.items()}
        if kind == "another dtype":
            stored = {n: p.double() for n, p in stored.items()}
        safetensors.torch.save_file(stored, file)
        index = {n: {"safetensors_file": str(file), "weight_name": s} for n, s in zip(away, stored, strict=True)}
        if kind == "another dtype":
            index = {n: entry | {"dtype": "float32"} for n, entry in index.items()}
    for name in away:
        set_module_tensor_to_device(model, name, "meta")
    before = sorted(p.name for p in tmp_path.iterdir())
    dispatch_model(model, HALF, offload_dir=tmp_path, offload_index=index)
    assert torch.equal(model(some()), expected(some())) and model.hf_device_map == HALF
    assert sorted(p.name for p in tmp_path.iterdir()) == before  # nothing is written a second time
    with pytest.raises(UnitError, match="meta device and has no values"):
        dispatch_model(torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta")), {"": "disk"}, offload_dir=tmp_path)


@pytest.mark.parametrize("how", ["gone", "short", "unknown", "shape"])
def test_an_offload_folder_that_is_not_right_is_told_before_anything_runs(tmp_path, how):
    model = make()
    offload_state_dict(tmp_path, {"last.weight": model.last.weight.detach()})
    index = json.loads((tmp_path / "index.json").read_text())
    set_module_tensor_to_device(model, "last.weight", "meta")
    if how == "gone":
        (tmp_path / "last.weight.dat").unlink()
    if how == "short":
        (tmp_path / "last.weight.dat").write_bytes(b"1234")
    if how == "unknown":
        safetensors.torch.save_file({"other": torch.zeros(2)}, tmp_path / "a.safetensors")
        index = {"last.weight": {"safetensors_file": str(tmp_path / "a.safetensors")}}
    if how == "shape":
        index["last.weight"]["shape"] = [8, 4]
    with pytest.raises((OffloadError, UnitError), match=r"last\.weight"):
        dispatch_model(model, HALF, offload_dir=tmp_path, offload_index=index)
    assert not hasattr(model, "shardwise_plan") and not hasattr(model, "hf_device_map")


@pytest.mark.parametrize("where", [{"": "cpu"}, {"": "disk"}, HALF])
def test_a_model_in_training_mode_stays_in_it(tmp_path, where):
    model, expected = make(), make()
    dispatch_model(model, where, offload_dir=tmp_path)
    assert model.training and torch.equal(model(some()), expected(some()))
    assert torch.equal(model.norm.running_mean, expected.norm.running_mean)  # it has learned
    file = tmp_path / "all.safetensors"
    safetensors.torch.save_file(make().state_dict(), file)
    other = load_checkpoint_and_dispatch(make(), file, {"": "disk"})
    assert other.training and torch.equal(other(some()), make()(some()))


def test_a_layer_of_the_root_called_by_itself_has_its_weights(tmp_path):
    model, expected = make().eval(), make().eval()
    safetensors.torch.save_file(make().state_dict(), tmp_path / "a.safetensors")
    loaded = shardwise.load(make(), {"": "disk"}, checkpoint=tmp_path / "a.safetensors")
    dispatch_model(model, {"": "disk"}, offload_dir=tmp_path / "away")
    x = torch.randn(3, 8)
    for one in (model, loaded):
        assert torch.equal(one.decode(x), expected.decode(x))
        assert torch.equal(one.last(x), expected.last(x)) and torch.equal(one(some()), expected(some()))


# --- on a device ------------------------------------------------------------------------------------------------
def inputs_from_the_host(folder: str) -> None:
    expected = make().eval()(some())
    for k, where in enumerate(({"": "disk"}, {"": "cpu", "last": 0}, HALF | {"norm": 0})):
        model = dispatch_model(make().eval(), where, offload_dir=Path(folder) / str(k))
        with torch.no_grad():
            out = model(some())
            assert out.device.type == "cpu" and torch.allclose(out, expected, atol=1e-5)
            assert model(some().to(SIM)).device == torch.device(SIM)  # what is there stays there
            assert model.decode(torch.randn(3, 8).to(SIM)).device == torch.device(SIM)
    model = cpu_offload(make().eval(), execution_device=0)
    assert torch.allclose(model(some()), expected, atol=1e-5)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    dispatch_model(tied, {"": 0})
    assert tied[1].weight is tied[0].weight and tied[0].weight.device == torch.device(SIM)
    safetensors.torch.save_file(make().state_dict(), f"{folder}/all.safetensors")
    loaded = shardwise.load(make(), {"": "disk"}, checkpoint=f"{folder}/all.safetensors")
    with torch.no_grad():
        assert torch.allclose(loaded(some()), expected, atol=1e-5)


@pytest.mark.usefixtures("simulated_device")
def test_inputs_may_be_on_the_host_and_outputs_come_back(tmp_path):
    run(1, inputs_from_the_host, str(tmp_path), device="sim")


# --- adapters ---------------------------------------------------------------------------------------------------
class Adapted(nn.Module):
    """As peft's layers: the layer that was there, and a small one beside it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.lora = base, nn.Linear(8, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora(x)


def with_adapters(model: Net) -> Net:
    torch.manual_seed(5)
    for block in model.blocks:
        block[0] = Adapted(block[0])
    return model


@pytest.mark.parametrize("where", [{"": "disk"}, {"": "cpu"}, {"blocks": "disk", "": "cpu"}])
def test_adapters_are_added_loaded_and_trained(tmp_path, where):
    safetensors.torch.save_file(make().state_dict(), tmp_path / "a.safetensors")
    model = with_adapters(shardwise.load(make(), where, checkpoint=tmp_path / "a.safetensors"))
    expected = with_adapters(make().eval())
    values = {n: torch.randn_like(p) for n, p in expected.named_parameters() if "lora" in n}
    for one in (model, expected):
        missing = one.load_state_dict(values, strict=False)
        assert not missing.unexpected_keys
        one.optimizer = torch.optim.SGD([p for n, p in one.named_parameters() if "lora" in n], 0.1)
    for _ in range(2):
        losses = [one(some()).square().mean() for one in (model, expected)]
        for one, loss in zip((model, expected), losses, strict=True):
            loss.backward()
            one.optimizer.step()
            one.optimizer.zero_grad()
        assert torch.equal(*losses)
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[n], wanted[n]) for n in wanted)
    before = model.blocks[0][0].lora.weight.clone()
    with pytest.raises(UnitError, match="weights of files"):
        model.load_state_dict(wanted | {n: v + 1 for n, v in values.items()})
    assert torch.equal(model.blocks[0][0].lora.weight, before)  # nothing of it was loaded
    model.last.weight = nn.Parameter(torch.zeros(4, 8))
    with pytest.raises(UnitError, match="replaced"):
        model(some())


def adapters_of_a_split_model(folder: str) -> str:
    model = with_adapters(shardwise.load(make(), "split", checkpoint=f"{folder}/a.safetensors"))
    try:
        model(some())
    except UnitError as error:
        for p in model.parameters():
            p.requires_grad_(False)
        assert torch.equal(model(some()), with_adapters(make().eval())(some()))
        return str(error)
    return ""


def test_adapters_of_a_model_that_ranks_split_run_and_are_not_trained_in_silence(tmp_path):
    safetensors.torch.save_file(make().state_dict(), tmp_path / "a.safetensors")
    for told in run(2, adapters_of_a_split_model, str(tmp_path)):
        assert "lora" in told and "added" in told


def test_a_dispatched_model_inside_another_one_is_dispatched_again(tmp_path, caplog):
    """What peft does, with a map of its own, when it has put its layers around the model's."""
    model = with_adapters(dispatch_model(make().eval(), {"": "disk"}, offload_dir=tmp_path))
    outer = nn.Sequential(model)
    with caplog.at_level(logging.WARNING):
        dispatch_model(outer, {"": "cpu"})
    assert "stay where they were" in caplog.text
    assert torch.equal(outer(some()), with_adapters(make().eval())(some()))
    with pytest.raises(UnitError, match="dispatched already"):  # by itself it would stay where it is without a word
        dispatch_model(model, {"": "cpu"})


# --- checkpoints --------------------------------------------------------------------------------------------------
def test_an_index_may_be_the_inner_dict_alone(tmp_path):
    state = make().state_dict()
    names = sorted(state)
    parts = {"one.bin": names[::2], "two.bin": names[1::2]}
    for file, its in parts.items():
        torch.save({n: state[n] for n in its}, tmp_path / file)
    (tmp_path / "map.index.json").write_text(json.dumps({n: f for f, its in parts.items() for n in its}))
    for where in (tmp_path / "map.index.json", tmp_path):
        model = Net()
        load_in(model, where)
        assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    (tmp_path / "map.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="index"):
        load_in(Net(), tmp_path / "map.index.json")


def test_what_goes_to_the_disk_is_on_meta_buffers_keep_their_values_and_surplus_is_told(tmp_path, caplog):
    state = make().state_dict() | {"foo": torch.zeros(2)}
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    model = Net()
    with caplog.at_level(logging.WARNING):
        load_in(model, tmp_path / "a.safetensors", {"": "cpu", "norm": "disk"}, offload_folder=tmp_path / "away")
    assert "foo" in caplog.text
    assert model.norm.weight.is_meta and torch.equal(model.norm.running_mean, state["norm.running_mean"])
    dispatch_model(model, {"": "cpu", "norm": "disk"}, offload_dir=tmp_path / "away")
    assert torch.equal(model.eval()(some()), make().eval()(some()))
    with pytest.raises(CheckpointError, match="foo"):
        load_in(Net(), tmp_path / "a.safetensors", strict=True)


# --- what newcomers hand over --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"device_map": "gpu"}, "device_map='gpu'"),
        ({"device_map": [1]}, r"device_map=\[1\]"),
        ({"device_map": {"": "dsk"}}, "'dsk'"),
        ({"device_map": {"": None}}, "None"),
        ({"device_map": {"": "meta"}}, "'meta'"),
        ({"device_map": {0: "cpu"}}, "the key 0"),
        ({"device_map": {"first": "disk"}}, r"no place for 'blocks\.0\.0\.weight'"),
        ({"device_map": {"": "disk", "block": "cpu"}}, "does not have: block"),
        ({"max_memory": "4GiB"}, "max_memory='4GiB'"),
        ({"no_split_module_classes": ["NoSuchLayer"]}, "'NoSuchLayer'"),
        ({"no_split_module_classes": "NoSuchLayer"}, "'NoSuchLayer'"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_read(tmp_path, asked, says):
    safetensors.torch.save_file(make().state_dict(), tmp_path / "a.safetensors")
    model = make()
    with pytest.raises(shardwise.ShardwiseError, match=says):
        shardwise.load(model, **asked, checkpoint=tmp_path / "a.safetensors")
    if "device_map" in asked:
        for does in (dispatch_model, lambda m, where: load_in(m, tmp_path / "a.safetensors", where)):
            if asked["device_map"] != {"": "disk", "block": "cpu"} or does is dispatch_model:
                with pytest.raises(shardwise.ShardwiseError):
                    does(model, asked["device_map"])
    assert torch.equal(model(some()), make()(some())) and model.first.weight.requires_grad  # as it was


@pytest.mark.parametrize("where", ["disk", "cpu", None, torch.device("cpu"), {"first.weight": "disk", "": "cpu"}])
def test_one_place_for_all_of_it_needs_no_dict(tmp_path, where):
    safetensors.torch.save_file(make().state_dict(), tmp_path / "a.safetensors")
    model = shardwise.load(make(), where, checkpoint=tmp_path / "a.safetensors", no_split_module_classes=[])
    assert torch.equal(model(some()), make().eval()(some()))
    assert (set(model.shardwise_plan.homes.values()) == {"nvme"}) == (where == "disk")


def test_parameters_of_one_module_in_a_map_are_together(tmp_path):
    """As ``infer_auto_device_map`` names them where a module has parameters beside its children."""
    where = {"first.weight": "disk", "first.bias": "cpu", "blocks": "cpu", "norm": "cpu", "last": "disk"}
    model = dispatch_model(make().eval(), where, offload_dir=tmp_path)
    assert torch.equal(model(some()), make().eval()(some()))


def test_files_with_more_than_the_model_are_refused(tmp_path):
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file(make().state_dict() | {"blocks.9.weight": torch.zeros(2)}, file)
    with pytest.raises(CheckpointError, match=r"blocks\.9\.weight' is in it only"):
        shardwise.load(make(), checkpoint=file)
    for model in (shardwise.load(make(), checkpoint=file, strict=False), load_checkpoint_and_dispatch(make(), file)):
        assert torch.equal(model.eval()(some()), make().eval()(some()))
    known = make()
    known._keys_to_ignore_on_load_unexpected = [r"blocks\.9"]
    assert torch.equal(shardwise.load(known, checkpoint=file)(some()), make().eval()(some()))
    with pytest.raises(CheckpointError, match="neither a folder nor a module"):
        shardwise.load(Net, checkpoint=file)


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "00000_root.safetensors.new").mkdir()
    model = make()
    with pytest.raises(OffloadError, match="cannot be written"):
        dispatch_model(model, {"": "disk"}, offload_dir=tmp_path)
    assert torch.equal(model(some()), make()(some()))


def test_two_models_in_one_folder_do_not_mix(tmp_path):
    first = dispatch_model(make().eval(), {"": "disk"}, offload_dir=tmp_path)
    torch.manual_seed(8)
    other = Net().eval()
    expected = other(some())
    assert torch.equal(dispatch_model(other, {"": "disk"}, offload_dir=tmp_path)(some()), expected)
    assert torch.equal(first(some()), make().eval()(some()))


def other_things_of_one_model(folder: str, asked: list[dict]) -> str:
    try:
        shardwise.load(make(), "split", checkpoint=f"{folder}/a.safetensors", **asked[rank()])
    except shardwise.ShardwiseError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"dtype": "bfloat16"}, "different dtypes"),
        ({"no_split_module_classes": ["Linear"]}, "different dtypes or units"),
        ({"dtype": "float99"}, "'float99' is not a dtype"),
        ({"max_memory": "1GB"}, "max_memory='1GB'"),
    ],
)
def test_ranks_that_split_a_model_and_ask_for_different_things_are_told_so(tmp_path, second, says):
    safetensors.torch.save_file(make().state_dict(), tmp_path / "a.safetensors")
    assert all(says in told for told in run(2, other_things_of_one_model, str(tmp_path), [{}, second]))


# --- threads --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("failing", [False, True])
def test_threads_that_call_one_model_wait_for_each_other(tmp_path, failing):
    model = dispatch_model(make().eval(), HALF, offload_dir=tmp_path)
    model = copy.deepcopy(model)
    expected, rows = make().eval(), range(1, 7)
    wanted = {n: expected(some(n)) for n in rows}
    right: list[bool] = []

    def call(n: int) -> None:
        with torch.no_grad():
            for _ in range(15):
                if failing and n % 2:
                    with contextlib.suppress(RuntimeError):
                        model(torch.randn(2, 7))
                right.append(torch.allclose(model(some(n)), wanted[n], atol=1e-6))

    threads = [threading.Thread(target=call, args=(n,), daemon=True) for n in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(right) == 15 * len(rows) and all(right)


def test_weights_of_files_that_are_to_be_trained_are_refused(tmp_path):
    model = dispatch_model(make().eval(), {"": "disk"}, offload_dir=tmp_path)
    model.requires_grad_(True)
    with pytest.raises(UnitError, match="weights of files"):
        model(some())
    with torch.no_grad():
        assert torch.equal(model(some()), make().eval()(some()))
    model.requires_grad_(False)
    x = some().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
