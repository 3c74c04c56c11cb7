"""Models without memory for their values, and single tensors that are put somewhere."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from shardwise import init_empty_weights, init_on_device, utils
from shardwise.big_modeling import infer_auto_device_map
from shardwise.errors import ConfigError, DeviceError, PlacementError
from shardwise.utils.modeling import get_non_persistent_buffers, set_module_tensor_to_device

META = torch.device("meta")


class Packed(nn.Parameter):
    """A parameter as bitsandbytes has them: its settings are arguments of its constructor, and moving changes it."""

    def __new__(cls, data=None, requires_grad=False, bits=8, state=None):
        self = torch.Tensor._make_subclass(cls, data, requires_grad)
        self.bits, self.state = bits, state
        return self

    def to(self, *args, **kwargs):
        moved = Packed(torch.Tensor.to(self.data, *args, **kwargs), self.requires_grad, self.bits, self.state)
        moved.moves = getattr(self, "moves", 0) + 1
        return moved


class Marked(nn.Parameter):
    """A subclass with torch's own constructor."""


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)
        self.packed = Packed(torch.ones(2), bits=4)
        self.marked = Marked(torch.ones(2), requires_grad=False)
        self.marked.layer = 7
        self.register_parameter("none", None)


# --- empty models -----------------------------------------------------------------------------------
def test_parameters_are_on_meta_and_buffers_are_not():
    with init_empty_weights():
        model = Model()
    assert all(p.is_meta for p in model.parameters()) and len(list(model.parameters())) == 5
    assert model.norm.running_mean.tolist() == [0, 0, 0]
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    assert not nn.modules.module._global_parameter_registration_hooks, "nothing is left behind"
    assert not nn.modules.module._global_buffer_registration_hooks


def test_buffers_too(monkeypatch):
    for values in ({"include_buffers": True}, {}):
        with init_empty_weights(**values):
            model = nn.Sequential(nn.BatchNorm1d(3))
            model.register_buffer("given", torch.ones(2, device="cpu"))
            model.p = nn.Parameter(torch.ones(2, device="cpu"))
        assert model[0].running_mean.is_meta and model.given.is_meta and model.p.is_meta
        monkeypatch.setenv("ACCELERATE_INIT_INCLUDE_BUFFERS", "1")
    with init_empty_weights(include_buffers=False):
        assert not nn.BatchNorm1d(3).running_mean.is_meta


def test_parameters_stay_what_they_are():
    with init_empty_weights():
        model = Model()
        assert type(model.packed) is Packed and model.packed.bits == 4 and not model.packed.requires_grad
        assert type(model.marked) is Marked and model.marked.layer == 7 and not model.marked.requires_grad
        model.embed.weight.requires_grad_(False)
        model.embed.weight.flag = "kept"
        held = model.embed.weight
        model.other = model.embed  # registered again
    assert model.embed.weight is held is model.head.weight
    assert utils.find_tied_parameters(model) == [["embed.weight", "head.weight", "other.weight"]]


def test_one_parameter_of_two_modules_is_one():
    outside = nn.Parameter(torch.ones(3))
    with init_empty_weights():
        one, other = nn.Module(), nn.Module()
        one.weight = outside
        other.weight = outside
    assert one.weight is other.weight and one.weight.is_meta
    assert outside.tolist() == [1, 1, 1], "the script's own is as it was"


def test_blocks_nest_and_the_innermost_counts():
    again = init_empty_weights()
    with again:
        with init_empty_weights():
            assert nn.Linear(1, 1).weight.is_meta
        assert nn.Linear(1, 1).weight.is_meta
        with init_on_device("cpu"):
            assert not nn.Linear(1, 1).weight.is_meta
        assert nn.Linear(1, 1).weight.is_meta
        with pytest.raises(ZeroDivisionError), init_empty_weights(include_buffers=True):
            1 / 0  # noqa: B018
        assert nn.Linear(1, 1).weight.is_meta and not nn.BatchNorm1d(1).running_mean.is_meta
    assert not nn.Linear(1, 1).weight.is_meta

    @init_empty_weights()
    def make(depth):
        inner = make(depth - 1) if depth else None
        return [nn.Linear(1, 1).weight.is_meta, *(inner or [])]

    assert make(2) == make(2) == [True] * 3


def test_other_threads_are_not_concerned():
    made = []
    with init_empty_weights():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(1, 1)))
        thread.start()
        thread.join()
    assert not made[0].weight.is_meta


def test_lazy_modules_are_empty_too():
    with init_empty_weights():
        layer = nn.LazyLinear(3)
    assert isinstance(layer.weight, nn.UninitializedParameter) and layer.weight.is_meta
    layer(torch.ones(2, 4, device="meta"))
    assert layer.weight.shape == (3, 4) and layer.weight.is_meta


def test_models_of_any_size():
    with init_empty_weights():
        large = nn.Sequential(*(nn.Linear(10_000, 10_000, bias=False) for _ in range(200)))
    assert utils.compute_module_sizes(large)[""] == 80 * 10**9
    found = infer_auto_device_map(large, {0: "30GB", 1: "30GB", "cpu": "10GB"})
    assert [list(found.values()).count(key) for key in (0, 1, "cpu", "disk")] == [74, 75, 24, 27]


def test_no_such_device():
    with pytest.raises(DeviceError, match="not a device"), init_on_device("nowhere"):
        pass


# --- one tensor ---------------------------------------------------------------------------------------
def test_a_tensor_goes_to_meta_and_comes_back():
    model = Model()
    for name, shape in (("head.weight", (5, 3)), ("norm.running_mean", (3,)), ("packed", (2,)), ("marked", (2,))):
        old = dict(utils.named_module_tensors(model, recurse=True)).get(name, model.head.weight)
        set_module_tensor_to_device(model, name, "cpu")
        path, _, last = name.rpartition(".")
        assert getattr(model.get_submodule(path), last) is old, "it is there already"
        set_module_tensor_to_device(model, name, "meta")
        new = getattr(model.get_submodule(path), last)
        assert new.is_meta and type(new) is type(old) and new.requires_grad == old.requires_grad
        with pytest.raises(PlacementError, match="has no values") as caught:
            set_module_tensor_to_device(model, name, "cpu")
        assert isinstance(caught.value, ValueError)
        value = torch.randn(shape)
        set_module_tensor_to_device(model, name, "cpu", value)
        new = getattr(model.get_submodule(path), last)
        assert torch.equal(new, value) and type(new) is type(old) and new.requires_grad == old.requires_grad
    assert model.marked.layer == 7 and model.packed.bits == 4


def test_a_parameter_that_moves_in_its_own_way_does():
    model = Model()
    set_module_tensor_to_device(model, "packed", "meta")
    assert model.packed.moves == 1 and model.packed.is_meta
    scales = torch.ones(2)
    set_module_tensor_to_device(model, "packed", "cpu", torch.ones(2), fp16_statistics=scales)
    assert model.packed.SCB is scales and model.packed.bits == 4


def test_dtypes():
    model = Model()
    set_module_tensor_to_device(model, "head.weight", "cpu", torch.ones(5, 3, dtype=torch.float64))
    assert model.head.weight.dtype == torch.float32  # the model's
    set_module_tensor_to_device(model, "head.weight", "cpu", torch.ones(5, 3), dtype="float16")
    assert model.head.weight.dtype == torch.float16
    set_module_tensor_to_device(model, "head.weight", "cpu", dtype=torch.bfloat16)
    assert model.head.weight.dtype == torch.bfloat16 and model.head.weight.sum() == 15
    set_module_tensor_to_device(model, "norm.num_batches_tracked", "cpu", torch.tensor(3), dtype=torch.float16)
    assert model.norm.num_batches_tracked.dtype == torch.int64


def test_what_cannot_be_put():
    model = Model()
    with pytest.raises(PlacementError, match=r"shape \(2, 2\) for 'weight', which has \(5, 3\)"):
        set_module_tensor_to_device(model, "head.weight", "cpu", torch.ones(2, 2))
    for name in ("head.bias", "nowhere.weight", "none", "head.weight.data"):
        with pytest.raises(PlacementError, match=name):
            set_module_tensor_to_device(model, name, "cpu")
    with pytest.raises(ConfigError, match="not a dtype"):
        set_module_tensor_to_device(model, "head.weight", "cpu", dtype="float17")
    with pytest.raises(DeviceError):
        set_module_tensor_to_device(model, "head.weight", "disk")


def test_tied_values_are_on_a_device_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    value = torch.randn(2, 2)
    known = {value.data_ptr(): {}}
    for i in range(3):
        set_module_tensor_to_device(model, f"{i}.weight", "cpu", value if i else None, tied_params_map=known)
    assert model[1].weight is model[2].weight is not model[0].weight
    assert list(known[value.data_ptr()]) == [torch.device("cpu")]
    set_module_tensor_to_device(model, "0.weight", "meta")
    others = {0: {torch.device("cpu"): model[1].weight}}
    set_module_tensor_to_device(model, "0.weight", "cpu", torch.zeros(2, 2), tied_params_map=others)
    assert model[0].weight.sum() == 0, "the addresses of tensors on meta tell nothing"


# --- ties and names -----------------------------------------------------------------------------------
def test_ties_are_made_again():
    model = Model()
    ties = utils.find_tied_parameters(model)
    for name in ("embed.weight", "head.weight"):
        set_module_tensor_to_device(model, name, "meta")
    utils.retie_parameters(model, ties)
    assert model.head.weight is not model.embed.weight  # none has values
    set_module_tensor_to_device(model, "head.weight", "cpu", torch.ones(5, 3))
    utils.retie_parameters(model, ties)
    assert model.head.weight is model.embed.weight and not model.embed.weight.is_meta


def test_buffers_that_state_dicts_leave_out():
    root = nn.Module()
    root.register_buffer("mask", torch.ones(1))
    root.sub = nn.Module()
    root.sub.register_buffer("mask", torch.ones(1), persistent=False)
    assert get_non_persistent_buffers(root) == set()
    assert get_non_persistent_buffers(root, recurse=True) == {"mask"}
    assert get_non_persistent_buffers(root, recurse=True, fqns=True) == {"sub.mask"}
    left = [name for name, _ in utils.named_module_tensors(root, recurse=True, remove_non_persistent=True)]
    assert left == ["mask"] and "mask" in root.state_dict()


def test_storages():
    whole = torch.ones(4)
    assert utils.id_tensor_storage(whole[1:]) == utils.id_tensor_storage(whole) != utils.id_tensor_storage(whole + 0)
    assert utils.id_tensor_storage(torch.ones(3, device="meta")) == (META, 0, 12)
