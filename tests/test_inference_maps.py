"""Device maps: sizes, budgets, what is placed where; tensors in files, and files of weights."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections import Counter
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import shardwise
from shardwise import device, init_empty_weights, utils
from shardwise.big_modeling import get_balanced_memory, get_max_memory, infer_auto_device_map
from shardwise.errors import CheckpointError, ConfigError, ForeignWeights, OffloadError, PlacementError
from shardwise.utils.modeling import check_device_map, clean_device_map, get_max_layer_size


class Group(nn.Module):
    """May be cut."""


class Block(nn.Module):
    """Stays whole."""


# --- any model, any budgets -------------------------------------------------------------------------
@st.composite
def part(draw, depth=0):
    kind = draw(st.sampled_from(["linear", "norm", *(["block", "group"] if depth < 3 else [])]))
    if kind == "linear":
        return nn.Linear(draw(st.integers(1, 9)), draw(st.integers(1, 9)), bias=draw(st.booleans()), device="meta")
    if kind == "norm":
        return nn.BatchNorm1d(draw(st.integers(1, 9)), device="meta")
    return draw(container(Block if kind == "block" else Group, depth + 1))


@st.composite
def container(draw, kind, depth):
    module = kind()
    for i in range(draw(st.integers(0 if depth else 1, 4))):
        module.add_module(f"m{i}", draw(part(depth)))
    if draw(st.booleans()):
        module.scale = nn.Parameter(torch.empty((), device="meta"))
    if draw(st.booleans()):
        module.register_buffer("mask", torch.empty(draw(st.integers(1, 40)), dtype=torch.bool, device="meta"))
        module.register_buffer("cache", torch.empty(3, device="meta"), persistent=draw(st.booleans()))
    return module


@st.composite
def model(draw):
    root = draw(container(Group, 0))
    owners = [(m, name) for m in root.modules() for name in m._parameters if m._parameters[name] is not None]
    for _ in range(draw(st.integers(0, 4)) if len(owners) > 1 else 0):
        (one, a), (other, b) = draw(st.sampled_from(owners)), draw(st.sampled_from(owners))
        one._parameters[a] = other._parameters[b]
    if draw(st.booleans()) and len(root._modules) > 1:
        root.again = next(iter(root.children()))  # one module under two names
    return root


def tensors_of(root):
    both = (root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False))
    return {name: tensor for pairs in both for name, tensor in pairs}


def place(name, device_map):
    found = [key for key in device_map if key == "" or name == key or name.startswith(f"{key}.")]
    assert len(found) == 1, f"{name} is in {found}"
    return device_map[found[0]]


def nbytes(tensors):
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def layers(module, path=""):
    children = {name: child for name, child in module._modules.items() if child is not None}
    if not children or isinstance(module, Block):
        yield path, module
        return
    for name, child in children.items():
        yield from layers(child, f"{path}.{name}" if path else name)


@settings(max_examples=150, deadline=None)
@given(model(), st.data())
def test_any_model_under_any_budgets(root, data):
    tensors = tensors_of(root)
    total = nbytes(tensors.values())
    size = st.integers(0, 2 * total)
    budgets = data.draw(st.fixed_dictionaries({}, optional={0: size, 1: size, 2: size, "cpu": size}), "budgets")
    fallback, clean = data.draw(st.booleans(), "fallback"), data.draw(st.booleans(), "clean")
    found = infer_auto_device_map(
        root, budgets, ["Block"], clean_result=clean, offload_buffers=True, fallback_allocation=fallback
    )
    where = {name: place(name, found) for name in tensors}  # one place each
    on = {key: {n: tensors[n] for n in tensors if where[n] == key} for key in [*budgets, "disk"]}
    assert sum(map(len, on.values())) == len(tensors), "on a device that was not offered"
    for key, most in budgets.items():
        assert nbytes(on[key].values()) <= most, f"{key} has more than its budget"
    for name, block in root.named_modules(remove_duplicate=False):
        inside = {where[n] for n in tensors if isinstance(block, Block) and n.startswith(f"{name}.")}
        assert len(inside) <= 1, f"{name} is cut"
    shared = {id(tensor): {where[n] for n in tensors if tensors[n] is tensor} for tensor in tensors.values()}
    assert all(len(places) == 1 for places in shared.values()), "tied, and on several devices"
    accelerators = [key for key in budgets if key != "cpu" and budgets[key]]
    if accelerators and nbytes(on[first := min(accelerators)].values()):
        away = [m for n, m in layers(root) if any(where[t] != first for t in tensors if t.startswith(f"{n}."))]
        largest = max((nbytes([*m.parameters(), *m.buffers()]) for m in away), default=0)
        assert nbytes(on[first].values()) + largest <= budgets[first], "no room for a layer that has to come there"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_device_map(root, found)


@settings(max_examples=50, deadline=None)
@given(model())
def test_what_fits_on_one_device_is_there(root):
    total = nbytes(tensors_of(root).values())
    assume(total)
    found = infer_auto_device_map(root, {0: 0, 1: total, "cpu": 10**9}, "Block")
    assert set(found.values()) == {1}


# --- the same by hand -------------------------------------------------------------------------------
class Small(nn.Module):  # 64 + 72 + 100 bytes
    def __init__(self):
        super().__init__()
        self.linear1, self.batchnorm, self.linear2 = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)


def test_the_first_device_keeps_room_and_the_next_does_not():
    assert infer_auto_device_map(Small(), {0: 200, 1: 172}) == {"linear1": 0, "batchnorm": 1, "linear2": 1}
    assert infer_auto_device_map(Small(), {0: 200, 1: 171, "cpu": 199}) == {
        "linear1": 0, "batchnorm": 1, "linear2": "cpu",
    }  # fmt: skip
    three = nn.Sequential(Small(), Small(), Small())
    assert infer_auto_device_map(three, {0: 500, 1: 500}, ["Small"]) == {"0": 0, "1": 1, "2": 1}
    cut = {"0": 0, "1.linear1": 0, "1.batchnorm": 0, "1.linear2": 1, "2": 1}
    assert infer_auto_device_map(three, {0: 500, 1: 500}) == cut
    assert infer_auto_device_map(Small(), {0: 235, "cpu": 1000}, "Small") == {"": "cpu"}  # the model itself stays whole
    assert infer_auto_device_map(nn.Linear(3, 4), {0: 63, "cpu": 1000}) == {"": "cpu"}  # and so does a layer


def test_everything_outside_of_blocks_has_a_place():
    root = Small()
    root.scale = nn.Parameter(torch.ones(()))
    root.register_buffer("table", torch.ones(8), persistent=False)
    root.batchnorm.extra = nn.Parameter(torch.ones(3))
    outer = nn.Sequential(root, nn.ReLU())
    found = infer_auto_device_map(outer, {0: 250, "cpu": 1000}, offload_buffers=True)
    for name in tensors_of(outer):
        place(name, found)
    assert found["0.scale"] == 0 and found["0.table"] == "cpu"


def test_ties_go_together_wherever_their_first_name_is():
    root = nn.Sequential(Small(), Small(), Small())
    root[2].linear2.weight = root[0].linear2.weight
    found = infer_auto_device_map(root, {0: 400, 1: 500})
    assert found == {"0": 0, "2.linear2": 0, "1": 1, "2.linear1": 1, "2.batchnorm": 1}
    chain = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))  # 0 and 4 by a weight, 4 and 2 by a bias
    chain[4].weight, chain[2].bias = chain[0].weight, chain[4].bias
    found = infer_auto_device_map(chain, {0: 288, 1: 1000})
    assert found["0"] == found["2"] == found["4"]
    assert found["1"] == 1
    twice = nn.Linear(4, 4)
    both = nn.Sequential(twice, nn.Linear(9, 9), twice)
    norm = nn.BatchNorm1d(1, affine=False)  # no parameters: 16 bytes of buffers
    pair = nn.Sequential(norm, nn.Linear(4, 1), norm)
    assert infer_auto_device_map(pair, {0: 36}) == {"": 0}
    assert infer_auto_device_map(both, {0: 1, 1: 439, "cpu": 1000}, clean_result=False) == {"0": 1, "2": 1, "1": "cpu"}


def test_a_later_part_fills_a_device_that_the_next_one_does_not_fit_on(caplog):
    root = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 4), nn.Linear(4, 8))
    with caplog.at_level(logging.INFO):
        assert infer_auto_device_map(root, {0: 256}) == {"": "disk"}
    assert "insufficient memory" in caplog.text
    assert infer_auto_device_map(root, {0: 256}, fallback_allocation=True) == {"0": "disk", "1": 0, "2": "disk"}


def test_buffers_that_no_accelerator_has_room_for():
    root = Small()
    root.linear2.register_buffer("large", torch.zeros(100))
    with pytest.warns(UserWarning, match="offload_buffers=True"):
        found = infer_auto_device_map(root, {0: 600, "cpu": "1GB"})
    assert found == {"linear1": 0, "batchnorm": "cpu", "linear2": "cpu"} or found["linear2"] == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infer_auto_device_map(root, {0: 600, "cpu": "1GB"}, offload_buffers=True)


def test_dtypes_of_the_loaded_model_decide():
    root = Small()
    assert infer_auto_device_map(root, {0: 122}, dtype="float16") == {"": 0}
    assert infer_auto_device_map(root, {0: 121}, dtype="float16") != {"": 0}
    assert infer_auto_device_map(root, {0: 236 + 80}, special_dtypes={"linear2.weight": torch.float64}) == {"": 0}
    assert infer_auto_device_map(root, {0: 236 + 79}, special_dtypes={"linear2.weight": torch.float64}) != {"": 0}


def test_it_says_what_it_does(capsys):
    infer_auto_device_map(nn.Sequential(Small(), Small()), {0: 400, 1: 300}, verbose=True)
    told = capsys.readouterr().out
    assert "0: 236 B, on 0" in told and "1: cut into its parts" in told


def test_room_for_what_a_module_has_of_its_own():
    root = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(1, 1)))
    root[1].table = nn.Parameter(torch.ones(50))
    found = infer_auto_device_map(root, {0: 223, "cpu": 1000})
    assert found == {"": "cpu"}, "24 bytes, and no room for 200 that have to come there"
    assert infer_auto_device_map(root, {0: 224, "cpu": 1000}) == {"0": 0, "1": "cpu"}


# --- maps --------------------------------------------------------------------------------------------
def test_maps_in_few_words():
    given_map = {"a.x": 0, "a.y": 0, "b.x.0": 1, "b.x.1": 1, "b.y.0": 2, "b.y.1": 2, "c": 2}
    assert clean_device_map(given_map) is given_map
    assert given_map == {"a": 0, "b.x": 1, "b.y": 2, "c": 2}
    assert clean_device_map({"a": 0, "b": 0}) == {"": 0}
    assert clean_device_map({"h.1.a": 0, "h.1.b": 0, "h.10.a": 1, "h.10.b": 0}) == {"h.1": 0, "h.10.a": 1, "h.10.b": 0}
    assert clean_device_map({"a.x": 0, "b": 1}) == {"a.x": 0, "b": 1}


def test_maps_are_checked():
    root = Small()
    check_device_map(root, {"": 0})
    check_device_map(root, {"linear1": 0, "linear2.weight": 1, "linear2.bias": 0, "batchnorm": "cpu"})
    with pytest.raises(PlacementError, match=r"linear2\.weight, linear2\.bias") as caught:
        check_device_map(root, {"linear1": 0, "batchnorm": 1})
    assert isinstance(caught.value, ValueError)
    with pytest.warns(UserWarning, match="linear7"):
        check_device_map(root, {"": 0, "linear7": 1})


def test_ties_on_several_devices_are_told(caplog):
    ties = [["a.weight", "b.c.weight"]]
    utils.check_tied_parameters_on_same_device(ties, {"a": 0, "b": 0})
    assert not caplog.records
    utils.check_tied_parameters_on_same_device(ties, {"a": 0, "": 1})
    assert "a.weight" in caplog.text
    with pytest.raises(PlacementError, match=r"b\.c\.weight"):
        utils.check_tied_parameters_on_same_device(ties, {"a": 0})


def test_configurations_that_tie():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 4}
    with init_empty_weights():
        tied = GPT2LMHeadModel(GPT2Config(**sizes))
        free = GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=False))
    assert utils.check_tied_parameters_in_config(tied) and not utils.check_tied_parameters_in_config(free)
    assert not utils.check_tied_parameters_in_config(Small())
    found = infer_auto_device_map(tied, {0: 1200, 1: 4000, "cpu": 10**6}, ["GPT2Block"])
    assert place("lm_head.weight", found) == place("transformer.wte.weight", found)


# --- sizes -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (torch.float8_e4m3fn, 1), (torch.float8_e8m0fnu, 1), (torch.int4, 1 / 2), (torch.uint2, 1 / 4),
        (torch.bool, 1 / 8), (torch.uint7, 7 / 8), (torch.quint4x2, 1 / 2), (torch.bits2x4, 1),
        (torch.float4_e2m1fn_x2, 1), (torch.complex64, 8), ("bfloat16", 2), ("torch.float64", 8),
        (utils.CustomDtype.INT4, 1 / 2), (utils.CustomDtype.FP8, 1), (Enum("Theirs", {"INT2": "int2"}).INT2, 1 / 4),
    ],
)  # fmt: skip
def test_bytes_of_an_element(dtype, size):
    assert utils.dtype_byte_size(dtype) == size


def test_no_dtype():
    for bad in ("float7", None, 3):
        with pytest.raises(ConfigError, match="not a dtype"):
            utils.dtype_byte_size(bad)


class Quantised(torch.Tensor):
    """Four-bit values in bytes, and a scale: what torch sees is a tensor of floats."""

    @staticmethod
    def __new__(cls, packed, scale):
        return torch.Tensor._make_wrapper_subclass(cls, (2 * packed.numel(),), dtype=torch.float32)

    def __init__(self, packed, scale):
        self.packed, self.scale = packed, scale

    def __tensor_flatten__(self):
        return ["packed", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed, args[0].scale)
        raise NotImplementedError(func)


def test_sizes_are_what_tensors_take():
    root = Small()
    root.q = nn.Module()
    root.q.weight = nn.Parameter(Quantised(torch.zeros(50, dtype=torch.uint8), torch.ones(5)))
    root.register_buffer("mask", torch.zeros(7, dtype=torch.bool))
    root.f8 = nn.Parameter(torch.zeros(3).to(torch.float8_e5m2), requires_grad=False)
    sizes = utils.compute_module_sizes(root)
    assert sizes["q"] == 50 + 20 and sizes["mask"] == 7 and sizes["f8"] == 3 and sizes[""] == 236 + 80
    narrow = utils.compute_module_sizes(root, dtype=torch.bfloat16)  # what is smaller stays as it is, as integers do
    assert narrow["f8"] == 3 and narrow["batchnorm.num_batches_tracked"] == 8 and narrow["linear1"] == 32
    assert utils.compute_module_sizes(root, dtype=utils.CustomDtype.INT4)["linear1.weight"] == 6
    assert utils.compute_module_sizes(root, buffers_only=True)[""] == 16 + 16 + 8 + 7
    assert utils.modeling.compute_module_total_buffer_size(root, dtype="float16") == 8 + 8 + 8 + 7


def test_the_largest_layer():
    root = nn.Sequential(Small(), nn.Linear(4, 5), nn.Linear(2, 2))
    sizes = utils.compute_module_sizes(root)
    assert get_max_layer_size(list(root.named_children()), sizes, []) == (100, ["0.linear2", "1"])
    assert get_max_layer_size(list(root.named_children()), sizes, "Small") == (236, ["0"])
    assert utils.calculate_maximum_sizes(root) == (236 + 100 + 24, (100, ["0.linear2", "1"]))


# --- memory ------------------------------------------------------------------------------------------
def test_memory_in_words(caplog):
    given_memory = {"disk": "1TB", "cpu": "2GiB", 1: "1.5KB", 0: 7}
    found = get_max_memory(given_memory)
    assert list(found.items()) == [(0, 7), (1, 1500), ("cpu", 2 << 30), ("disk", 10**12)]
    assert given_memory[1] == "1.5KB", "the caller's own"
    with pytest.raises(PlacementError, match="tpu"):
        get_max_memory({"tpu": 1})
    with pytest.raises(ConfigError):
        get_max_memory({0: "many"})
    assert "device 1 is not available" in caplog.text or device.count() > 1


def test_memory_that_is_free(monkeypatch):
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < get_max_memory()["cpu"] <= whole
    monkeypatch.setattr(device, "accelerator", lambda: "xpu")
    monkeypatch.setattr(device, "count", lambda: 3)

    def memory(asked):
        if asked.index == 1:
            raise RuntimeError("in use by somebody else")
        return 1000 + asked.index, 5000

    monkeypatch.setattr(device, "memory", memory)
    assert {k: v for k, v in get_max_memory().items() if k != "cpu"} == {0: 1000, 2: 1002}
    monkeypatch.setattr(device, "memory", lambda asked: None)  # the host's own memory
    assert list(get_max_memory()) == ["xpu"]


def test_balanced_budgets():
    root = Small()
    assert get_balanced_memory(root, {0: 200, 2: 200}) == {0: 200, 2: 200}
    assert get_balanced_memory(root, {0: 300, 1: 500}) == {0: 215, 1: 500}
    assert get_balanced_memory(root, {0: 0, 1: 300, 2: 300}) == {0: 0, 1: 215, 2: 300}
    assert get_balanced_memory(root, {0: 300, "cpu": 1000}) == {0: 300, "cpu": 1000}
    assert get_balanced_memory(root, {0: 300, 1: 300}, {"Linear"}) == {0: 118 + 125, 1: 300}
    three = nn.Sequential(*(nn.Linear(10, 10) for _ in range(8)))
    budgets = get_balanced_memory(three, {0: 10**4, 1: 10**4, 5: 10**4})
    spread = Counter(infer_auto_device_map(three, budgets).values())
    assert max(spread.values()) <= 4 and len(spread) == 3
    low = get_balanced_memory(three, {0: 10**4, 3: 10**4, 5: 10**4}, low_zero=True)
    assert low[0] == 0 and low[3] < 10**4


# --- tensors in files ---------------------------------------------------------------------------------
TENSORS = {
    "a.weight": torch.randn(3, 4),
    "a.bias": torch.randn(5).to(torch.bfloat16),
    "a.f8": torch.randn(4).to(torch.float8_e4m3fn),
    "b.count": torch.tensor(7),
    "b.none": torch.ones(0, 3),
    "b.mask": torch.tensor([True, False]),
    "b.turned": torch.arange(6).reshape(2, 3).t(),
}


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.float(), other.float())


def test_tensors_in_a_folder(tmp_path):
    utils.offload_state_dict(tmp_path / "new", TENSORS)
    found = utils.OffloadedWeightsLoader(save_folder=tmp_path / "new")
    assert list(found) == list(TENSORS) and all(same(found[name], TENSORS[name]) for name in TENSORS)
    both = utils.OffloadedWeightsLoader({"a.bias": torch.zeros(2), "x": torch.ones(1)}, save_folder=tmp_path / "new")
    assert len(both) == len(TENSORS) + 1 and both["a.bias"].shape == (2,)  # those in memory come first
    inside = utils.PrefixedDataset(found, "b.")
    assert dict(inside).keys() == {"count", "none", "mask", "turned"} and len(inside) == 4
    assert same(inside["mask"], TENSORS["b.mask"]) and inside.get("weight") is None
    index = utils.offload_weight(torch.ones(2), "late", tmp_path / "new", {})
    utils.save_offload_index(index, tmp_path / "new")
    assert len(utils.OffloadedWeightsLoader(save_folder=tmp_path / "new")) == len(TENSORS) + 1
    with pytest.raises(ConfigError, match="nothing to load"):
        utils.OffloadedWeightsLoader()
    (tmp_path / "new" / "late.dat").write_bytes(b"123")
    with pytest.raises(OffloadError, match=r"late\.dat: 3 bytes, where 8") as caught:
        utils.load_offloaded_weight(tmp_path / "new" / "late.dat", index["late"])
    assert isinstance(caught.value, OSError)


def test_a_model_gets_the_values_of_a_folder(tmp_path):
    source = Small()
    utils.offload_state_dict(tmp_path, source.state_dict())
    with init_empty_weights():
        empty = Small()
    index = {name: dict(utils.OffloadedWeightsLoader(save_folder=tmp_path).index[name]) for name in source.state_dict()}
    utils.load_offloaded_weights(empty, index, tmp_path)
    assert all(torch.equal(value, empty.state_dict()[name]) for name, value in source.state_dict().items())


def test_tensors_of_some_modules():
    given_state = {"h.1.a": 0, "h.10.a": 1, "h.2": 2, "h.2.x.y": 3}
    assert utils.extract_submodules_state_dict(given_state, ["h.1", "h.2"]) == {"h.1.a": 0, "h.2": 2, "h.2.x.y": 3}


def test_tensors_of_a_safetensors_file(tmp_path):
    save_file({"w": torch.arange(4.0)}, tmp_path / "f.safetensors")
    index = {"x": {"safetensors_file": str(tmp_path / "f.safetensors"), "weight_name": "w", "dtype": "bfloat16"}}
    found = utils.OffloadedWeightsLoader(index=index, device="meta")["x"]
    assert found.dtype == torch.bfloat16 and found.is_meta
    assert utils.OffloadedWeightsLoader(index=index)["x"].tolist() == [0, 1, 2, 3]


# --- files of weights -----------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_files_of_weights(tmp_path, suffix):
    path = tmp_path / f"f.{suffix}"
    state = {name: value.contiguous() for name, value in TENSORS.items()}
    save_file(state, path, {"format": "pt"}) if suffix == "safetensors" else torch.save(state, path)
    found = utils.load_state_dict(str(path))
    assert found.keys() == state.keys() and all(same(found[name], state[name]) for name in state)
    there = utils.load_state_dict(path, {"a": "meta", "a.bias": "cpu", "b": "disk"})
    assert [there[name].device.type for name in ("a.weight", "a.bias", "b.count")] == ["meta", "cpu", "cpu"]


def test_files_that_are_not_weights(tmp_path, caplog):
    save_file({"w": torch.ones(1)}, tmp_path / "other.safetensors", {"format": "tf"})
    with pytest.raises(ForeignWeights, match="was saved for tf") as caught:
        utils.load_state_dict(tmp_path / "other.safetensors")
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, OSError)
    save_file({"w": torch.ones(1)}, tmp_path / "plain.safetensors")
    assert utils.load_state_dict(tmp_path / "plain.safetensors")["w"].item() == 1
    assert "does not say" in caplog.text
    (tmp_path / "bad.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0junk!")
    touched = tmp_path / "touched"
    with open(tmp_path / "evil.bin", "wb") as file:
        pickle.dump(protocol=2, obj={"w": Evil(touched)}, file=file)
    torch.save([torch.ones(1)], tmp_path / "list.bin")
    for name in ("bad.safetensors", "evil.bin", "list.bin"):
        with pytest.raises(CheckpointError, match=name):
            utils.load_state_dict(tmp_path / name)
    assert not touched.exists()
    with pytest.raises(FileNotFoundError):
        utils.load_state_dict(tmp_path / "nothing.bin")


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_names_are_the_same_everywhere():
    assert shardwise.infer_auto_device_map is infer_auto_device_map
    assert SimpleNamespace(**vars(utils.modeling)).infer_auto_device_map is infer_auto_device_map
