"""Hooks around ``forward``: what they see and change, that they go without a trace, and what moves tensors."""

from __future__ import annotations

import copy
import inspect
import io

import pytest
import torch
from torch import nn

from ranks import run
from shardwise import cpu_offload_with_hook, utils
from shardwise.big_modeling import attach_layerwise_casting_hooks
from shardwise.errors import PlacementError
from shardwise.hooks import (
    AlignDevicesHook,
    CpuOffload,
    ModelHook,
    SequentialHook,
    add_hook_to_module,
    attach_align_device_hook,
    attach_align_device_hook_on_blocks,
    attach_execution_device_hook,
    remove_hook_from_module,
    remove_hook_from_submodules,
)
from shardwise.utils.modeling import get_state_dict_from_offload, get_state_dict_offloaded_model


class Add(ModelHook):
    def __init__(self, number):
        self.number = number
        self.seen = []

    def init_hook(self, module):
        self.seen.append("init")
        return module

    def pre_forward(self, module, *args, **kwargs):
        return (args[0] + self.number, *args[1:]), kwargs

    def post_forward(self, module, output):
        return output * self.number

    def detach_hook(self, module):
        self.seen.append("detach")
        return module


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, *, more=0):
        """Twice."""
        return self.weight * x + more


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
        self.register_buffer("shift", torch.ones(3), persistent=False)

    def forward(self, x):
        return self.last(self.norm(self.first(x))) * self.scale + self.shift


def model_and_its_output():
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(5, 3)
    return model, x, model(x).detach()


# --- adding and removing ---------------------------------------------------------------------------------
def test_a_hook_sees_and_changes_what_goes_in_and_out():
    module = Plain()
    assert add_hook_to_module(module, Add(3)) is module
    assert module(torch.tensor(1.0), more=1).item() == 3 * (2 * (1 + 3) + 1)
    assert list(inspect.signature(module.forward).parameters) == ["x", "more"]
    assert (module.forward.__name__, module.forward.__doc__) == ("forward", "Twice.")


def test_a_second_hook_replaces_or_follows():
    module, first = Plain(), Add(3)
    add_hook_to_module(module, first)
    add_hook_to_module(module, Add(5))
    assert module(torch.tensor(0.0)).item() == 5 * 2 * 5 and first.seen == ["init", "detach"]
    add_hook_to_module(module, second := Add(7), append=True)
    assert isinstance(module._hf_hook, SequentialHook) and module._hf_hook.hooks[1] is second
    assert module(torch.tensor(0.0)).item() == 2 * (5 + 7) * 5 * 7
    add_hook_to_module(module, Add(1), append=True)
    assert module(torch.tensor(0.0)).item() == 2 * (5 + 7 + 1) * 5 * 7
    remove_hook_from_module(module)
    assert second.seen.count("init") == second.seen.count("detach")


def test_removing_leaves_no_trace():
    module = Plain()
    before = dict(module.__dict__)
    add_hook_to_module(module, Add(3))
    add_hook_to_module(module, Add(5), append=True)
    remove_hook_from_module(module)
    assert module.__dict__ == before and module.forward.__func__ is Plain.forward
    remove_hook_from_module(module)  # none is there
    mine = module.forward = lambda x: x + 100  # the script's own
    add_hook_to_module(module, Add(1))
    assert module(torch.tensor(0.0)).item() == 101
    remove_hook_from_module(module)
    assert module.forward is mine


def test_somebody_elses_wrapper_stays():
    module = Plain()
    add_hook_to_module(module, Add(3))
    hooked = module.forward
    module.forward = lambda x: -hooked(x)
    assert module(torch.tensor(1.0)).item() == -24
    remove_hook_from_module(module)
    assert module(torch.tensor(1.0)).item() == -2
    add_hook_to_module(module, Add(1))
    assert module(torch.tensor(1.0)).item() == -4


def test_hooks_inside_go_too():
    model = nn.Sequential(Plain(), nn.Sequential(Plain()))
    for module in (model[0], model[1], model[1][0]):
        add_hook_to_module(module, Add(3))
    remove_hook_from_module(model[1], recurse=True)
    assert [hasattr(m, "_hf_hook") for m in (model[0], model[1], model[1][0])] == [True, False, False]
    remove_hook_from_submodules(model)
    assert model(torch.tensor(1.0)).item() == 4


def test_a_copy_has_a_hook_of_its_own():
    module = nn.Sequential(Plain())
    add_hook_to_module(module[0], Add(3))
    other = copy.deepcopy(module)
    other[0].weight.data.fill_(10.0)
    other[0]._hf_hook.number = 1
    assert module(torch.tensor(1.0)).item() == 3 * 2 * 4 and other(torch.tensor(1.0)).item() == 10 * 2
    remove_hook_from_submodules(module)
    assert module(torch.tensor(1.0)).item() == 2 and other(torch.tensor(1.0)).item() == 20
    remove_hook_from_submodules(other)
    assert other(torch.tensor(1.0)).item() == 10 and "forward" not in other[0].__dict__


def test_a_saved_module_has_its_hook():
    module = Plain()
    add_hook_to_module(module, Add(3))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    other.weight.data.fill_(1.0)
    assert other(torch.tensor(1.0)).item() == 12 and module(torch.tensor(1.0)).item() == 24


@pytest.mark.parametrize("wrap", [lambda hook: hook, SequentialHook])
def test_no_gradients_if_the_hook_says_so(wrap):
    module, hook = Plain(), ModelHook()
    add_hook_to_module(module, wrap(hook))
    assert module(torch.tensor(1.0)).requires_grad
    hook.no_grad = True
    assert not module(torch.tensor(1.0)).requires_grad and torch.is_grad_enabled()


def test_traced_modules_can_still_change():
    traced = torch.fx.symbolic_trace(Plain())
    add_hook_to_module(traced, ModelHook())
    remove_hook_from_module(traced)
    output = next(node for node in traced.graph.nodes if node.op == "output")
    with traced.graph.inserting_before(output):
        negative = traced.graph.call_function(torch.neg, (output.args[0],))
    output.args = (negative,)
    traced.recompile()
    assert traced(torch.tensor(1.0)).item() == -2


# --- tensors that come and go --------------------------------------------------------------------------------
def where(model):
    both = (model.named_parameters(remove_duplicate=False), model.named_buffers())
    return {name: tensor.device.type for pairs in both for name, tensor in pairs}


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_offloaded_models_compute_the_same(buffers, weights):
    model, x, expected = model_and_its_output()
    before = dict(model.named_parameters())
    state = model.state_dict() if weights else None
    attach_align_device_hook(model, "cpu", offload=True, offload_buffers=buffers, weights_map=state)
    places = where(model)
    assert {places[name] for name in before} == {"meta"}
    assert places["norm.running_mean"] == ("meta" if buffers else "cpu")
    assert places["shift"] == "cpu", "no state dict would bring it back"
    assert torch.equal(model(x), expected) and where(model) == places
    assert all(utils.has_offloaded_params(m) for m in model.modules())
    assert all(torch.equal(t, before[n]) for n, t in get_state_dict_offloaded_model(model).items() if n in before)
    remove_hook_from_submodules(model)
    assert set(where(model).values()) == {"cpu"} and torch.equal(model(x), expected)
    if not weights:
        assert all(p is before[name] for name, p in model.named_parameters()), "the same parameters as before"


def test_offloaded_weights_from_files_and_memory(tmp_path):
    model, x, expected = model_and_its_output()
    state = model.state_dict()
    utils.offload_state_dict(tmp_path, {name: t for name, t in state.items() if name.startswith("last")})
    loader = utils.OffloadedWeightsLoader(
        {name: t for name, t in state.items() if not name.startswith("last")}, tmp_path
    )
    attach_align_device_hook(model, "cpu", offload=True, weights_map=loader)
    assert torch.equal(model(x), expected) and where(model)["last.weight"] == "meta"
    other = copy.deepcopy(model)
    remove_hook_from_submodules(model)
    assert torch.equal(other(x), expected) and where(other)["last.weight"] == "meta"
    assert get_state_dict_offloaded_model(other).keys() == state.keys()


def test_weights_that_a_module_uses_without_calling_its_owner():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return x @ self.inner.weight.t() + self.inner.bias

    model = nn.Sequential(Direct(), nn.Linear(3, 3))
    x = torch.randn(2, 3)
    expected = model(x)
    attach_align_device_hook(model, "cpu", offload=True, preload_module_classes=["Direct"])
    assert where(model)["0.inner.weight"] == "meta" and not hasattr(model[0].inner, "_hf_hook")
    assert torch.equal(model(x), expected)


def test_tied_weights_that_are_offloaded_share_memory_while_they_are_there():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Sequential(nn.Linear(3, 3, bias=False)))
    model[1][0].weight = model[0].weight
    state = model.state_dict()
    known = {model[0].weight.data_ptr(): {}}
    attach_align_device_hook(model, "cpu", offload=True, weights_map=state, tied_params_map=known)
    with utils.align_module_device(model[0]), utils.align_module_device(model[1][0]):
        assert model[0].weight is model[1][0].weight and not model[0].weight.is_meta
    assert known == {state["0.weight"].data_ptr(): {}} and model[0].weight.is_meta


def test_a_module_with_two_names_has_one_hook():
    layer = nn.Linear(3, 3)
    for attach in (
        lambda model: attach_align_device_hook(model, "cpu", offload=True),
        lambda model: attach_align_device_hook_on_blocks(model, "cpu", {"0": True, "2": True}),
    ):
        model = nn.Sequential(layer, nn.Sequential(layer), layer)
        x = torch.randn(2, 3)
        expected = model(x)
        attach(model)
        assert layer.weight.is_meta and isinstance(layer._hf_hook, AlignDevicesHook)
        assert torch.equal(model(x), expected)
        remove_hook_from_submodules(model)
        assert not layer.weight.is_meta


def test_eight_bit_weights_get_their_scales():
    module = nn.Linear(2, 2, bias=False)
    module.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    weights = {"weight": torch.ones(2, 2, dtype=torch.int8), "SCB": torch.tensor([3.0, 4.0])}
    add_hook_to_module(module, AlignDevicesHook("cpu", offload=True, weights_map=weights))
    with utils.align_module_device(module):
        assert module.weight.SCB.tolist() == [3, 4] and module.weight.dtype == torch.int8


def test_blocks_of_a_map():
    model, x, expected = model_and_its_output()
    devices = dict.fromkeys(("first", "norm", "last", "scale", "shift", ""), "cpu")
    offload = {"first": True, "norm": False, "last": False, "": False}
    attach_align_device_hook_on_blocks(model, devices, {**offload, "": False}, weights_map=model.state_dict())
    assert {name for name, place in where(model).items() if place == "meta"} == {"first.weight", "first.bias"}
    assert torch.equal(model(x), expected) and model._hf_hook.io_same_device
    remove_hook_from_submodules(model)
    attach_align_device_hook_on_blocks(model, "cpu", offload={"last": True}, weights_map=model.state_dict())
    assert torch.equal(model(x), expected) and where(model)["last.bias"] == "meta"
    remove_hook_from_submodules(model)
    attach_align_device_hook_on_blocks(model, "cpu", offload=True)
    assert where(model)["scale"] == "meta" and torch.equal(model(x), expected)


def test_inputs_go_where_the_module_computes():
    class Where(nn.Module):
        def forward(self, x, **more):
            return {"x": x, **more}

    module = Where()
    add_hook_to_module(module, AlignDevicesHook("meta", skip_keys="stay"))
    out = module(torch.ones(1), moved=[torch.ones(1, device="meta")], stay=torch.ones(1))
    assert out["x"].is_meta and out["moved"][0].is_meta and out["stay"].item() == 1
    assert "execution_device='meta'" in repr(module._hf_hook) and "skip_keys='stay'" in repr(module._hf_hook)


# --- on one device for a while ---------------------------------------------------------------------------------
def test_a_module_is_elsewhere_for_a_block():
    model = Model()
    before = dict(model.first.named_parameters())
    with utils.align_module_device(model.first, "meta"):
        assert model.first.weight.is_meta and not model.last.weight.is_meta and not model.norm.running_mean.is_meta
    with pytest.raises(ZeroDivisionError), utils.align_module_device(model.first, "cpu"):
        1 / 0  # noqa: B018
    with utils.align_module_device(model.first):
        model.first.bias = nn.Parameter(torch.zeros(4))
    assert model.first.weight is before["weight"] and model.first.bias.abs().sum() == 0
    empty = nn.Linear(2, 2, device="meta")
    with pytest.raises(PlacementError, match="has no values"), utils.align_module_device(empty, "cpu"):
        pass
    assert empty.weight.is_meta


def test_an_offloaded_module_is_there_for_a_block():
    model, x, expected = model_and_its_output()
    add_hook_to_module(model.last, ModelHook())
    attach_align_device_hook(model, "cpu", offload=True)
    with utils.align_module_device(model.last, "cpu"):
        assert not model.last.weight.is_meta and model.first.weight.is_meta
        here = get_state_dict_from_offload(model.last, "last.weight", {"last.weight": None, "x": 1})
        assert here["x"] == 1 and here["last.weight"].shape == (3, 4)
    assert model.last.weight.is_meta and torch.equal(model(x), expected)


# --- models that take turns, and narrow weights ---------------------------------------------------------------
def test_models_take_turns_without_an_accelerator():
    one, hook = cpu_offload_with_hook(nn.Linear(2, 2), "cpu")
    other, last = cpu_offload_with_hook(nn.Linear(2, 2), "cpu", prev_module_hook=hook)
    assert other(one(torch.ones(1, 2))).shape == (1, 2)
    last.remove()
    assert not hasattr(other, "_hf_hook") and hasattr(one, "_hf_hook")
    assert cpu_offload_with_hook(nn.ReLU(), "cpu")[0](torch.ones(1)).item() == 1  # it has no parameters


@pytest.mark.parametrize("narrow", [torch.float16, torch.float8_e4m3fn])
def test_narrow_weights_are_cast_for_each_call(narrow):
    model, x, expected = model_and_its_output()
    attach_layerwise_casting_hooks(model, narrow, torch.float32, skip_modules_pattern="^last")
    assert model.first.weight.dtype == narrow and model.last.weight.dtype == torch.float32
    assert model.norm.weight.dtype == model.scale.dtype == torch.float32
    out = model(x)
    assert out.dtype == torch.float32 and model.first.bias.dtype == narrow
    torch.testing.assert_close(out, expected, atol=0.2, rtol=0.2)
    model = Model()
    attach_layerwise_casting_hooks(model, narrow, torch.float32, skip_modules_classes=(nn.Linear,))
    assert model.first.weight.dtype == torch.float32


# --- on another device than the host ---------------------------------------------------------------------------
def on_two_devices():
    """Everything above where copies and kernels run late; returns what differs from the host alone."""
    model, x, expected = model_and_its_output()
    got = []
    attach_align_device_hook(model, 0, offload=True, weights_map=model.state_dict())
    add_hook_to_module(model, AlignDevicesHook(io_same_device=True), append=True)
    got.append(str(model.shift.device))
    got.append(torch.allclose(model(x).cpu(), expected, atol=1e-5))
    remove_hook_from_submodules(model)
    devices = {"first": 1, "norm": 0, "last": 0, "": 0}
    attach_align_device_hook_on_blocks(
        model, devices, {"first": False, "norm": False, "last": True, "": False}, model.cpu().state_dict()
    )
    got.append([str(model.first.weight.device), str(model.norm.running_mean.device), str(model.last.weight.device)])
    out = model(x)
    got.append([str(out.device), torch.allclose(out, expected, atol=1e-5)])
    remove_hook_from_submodules(model)
    model.cpu()
    attach_execution_device_hook(model, "sim:1")
    got.append([str(model(x).device), {str(p.device) for p in model.parameters()} == {"sim:1"}])
    remove_hook_from_submodules(model)
    one, first = cpu_offload_with_hook(nn.Linear(2, 2))
    other, second = cpu_offload_with_hook(nn.Linear(2, 2), prev_module_hook=first)
    middle = one(torch.ones(1, 2))
    got.append([str(one.weight.device), str(other.weight.device)])
    other(middle)
    got.append([str(one.weight.device), str(other.weight.device), str(CpuOffload().execution_device)])
    second.offload()
    got.append(str(other.weight.device))
    with utils.align_module_device(one, 0):
        one.weight.data.fill_(3.0)
    got.append([str(one.weight.device), one.weight.sum().item()])
    free = utils.get_max_memory()
    got.append([list(free), all(free.values())])
    return got


@pytest.mark.usefixtures("simulated_device")
@pytest.mark.timeout(600)
def test_on_devices_that_run_late():
    assert run(1, on_two_devices, device="sim")[0] == [
        "sim:0",
        True,
        ["sim:1", "sim:0", "meta"],
        ["cpu", True],
        ["sim:1", True],
        ["sim:0", "cpu"],
        ["cpu", "sim:0", "sim:0"],
        "cpu",
        ["cpu", 12.0],
        [[0, 1, "cpu"], True],
    ]
