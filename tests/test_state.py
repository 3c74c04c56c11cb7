"""Who this process is, who runs what, and what the states of an Accelerator show."""

from __future__ import annotations

import time

import pytest
import torch

from models import rank, world
from ranks import run
from shardwise import Accelerator, PartialState
from shardwise.errors import DataError, StrategyError
from shardwise.state import AcceleratorState, GradientState, is_initialized
from shardwise.utils import DistributedType


def everywhere(size, function, *args):
    return [function(*args)] if size == 1 else run(size, function, *args)


# --- facts ---------------------------------------------------------------------------------------
def facts():
    state = PartialState(cpu=True)
    assert state.process_index == state.local_process_index == rank()
    assert state.num_processes == world()
    assert state.is_main_process is state.is_local_main_process is (rank() == 0)
    assert state.is_last_process is (rank() == world() - 1)
    assert state.distributed_type == (DistributedType.NO if world() == 1 else DistributedType.MULTI_CPU)
    assert state.device == torch.device("cpu") and state.initialized
    assert state.backend == (None if world() == 1 else "gloo")
    assert f"Process index: {rank()}" in repr(state)
    accelerator = Accelerator(cpu=True, strategy="zero1", mixed_precision="bf16")
    for one in (accelerator, accelerator.state):
        assert one.process_index == rank() and one.num_processes == world() and one.mixed_precision == "bf16"
        assert one.use_distributed is (world() > 1)


@pytest.mark.parametrize("size", [1, 3])
def test_facts(size):
    everywhere(size, facts)


# --- who runs what ---------------------------------------------------------------------------------
def decorated():
    state = PartialState(cpu=True)

    @state.on_main_process
    def main(x):
        """Doc."""
        return x

    @state.on_process(process_index=1)
    def second(x):
        return x

    last = state.on_last_process(lambda x: x)
    local = state.on_local_main_process(lambda x: x)
    third = state.on_local_process(lambda x: x, local_process_index=2)
    assert main.__doc__ == "Doc."
    with pytest.raises(DataError, match="names no rank"):
        state.on_process(process_index=7)
    return [f(5) for f in (main, local, second, last, third)]


def test_decorators():
    assert run(3, decorated) == [[5, 5, None, None, None], [None, None, 5, None, None], [None, None, None, 5, 5]]


def order(raising):
    state = PartialState(cpu=True)
    times = []
    try:
        with state.main_process_first():
            if state.is_main_process:
                time.sleep(0.2)
            times.append(time.time())
            if raising and state.is_main_process:
                raise KeyError("the main process stumbles")
    except KeyError:
        pass
    return times[0]


@pytest.mark.parametrize("raising", [False, True])
def test_the_main_process_goes_first(raising):
    first, *others = run(3, order, raising)
    assert all(first <= other for other in others)


def printing(capture=None):
    PartialState(cpu=True).print("once")


def test_print(capfd):
    printing()
    assert capfd.readouterr().out == "once\n"


# --- parts -------------------------------------------------------------------------------------------
def parts(length, padding):
    state = PartialState(cpu=True)
    inputs = list(range(length))
    tensor = torch.arange(2 * length).reshape(length, 2)
    out = []
    for given in (inputs, tuple(inputs), tensor, {"a": inputs, "b": tensor}):
        with state.split_between_processes(given, apply_padding=padding) as mine:
            out.append(mine)
    listed, tupled, rows, mapped = out
    assert type(tupled) is tuple and list(tupled) == listed == mapped["a"]
    assert torch.equal(rows, mapped["b"]) and rows[:, 0].tolist() == [2 * i for i in listed]
    assert inputs == list(range(length)), "the caller's own list was changed"
    with pytest.raises(DataError, match="lengths"), state.split_between_processes({"a": [1], "b": [1, 2]}):
        pass
    with pytest.raises(DataError, match="cannot split"), state.split_between_processes({1, 2, 3}):
        pass
    return listed


@pytest.mark.parametrize("length", [1, 2, 3, 5, 9])
def test_split_between_processes(length):
    mine = run(3, parts, length, False)
    assert [i for part in mine for i in part] == list(range(length))
    assert max(map(len, mine)) - min(map(len, mine)) <= 1
    padded = run(3, parts, length, True)
    assert {len(part) for part in padded} == {-(-length // 3)}
    for part, whole in zip(mine, padded, strict=True):
        assert whole[: len(part)] == part and all(i == length - 1 for i in whole[len(part) :])


# --- states of an Accelerator ----------------------------------------------------------------------------
def test_states_show_the_accelerator_made_last(monkeypatch):
    monkeypatch.setattr(AcceleratorState, "_newest", None)
    assert not is_initialized()
    with pytest.raises(StrategyError, match="no Accelerator yet"):
        AcceleratorState()
    first = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    assert is_initialized()
    assert AcceleratorState().mixed_precision == "bf16" and GradientState().num_steps == 3
    second = Accelerator(cpu=True)
    assert AcceleratorState().mixed_precision == "no" and GradientState().num_steps == 1
    assert first.state.mixed_precision == "bf16" and first.gradient_state.num_steps == 3
    assert second.mixed_precision == "no"


def test_gradient_state_follows_the_window():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = torch.nn.Linear(1, 1)
    data = torch.utils.data.DataLoader(torch.ones(3, 1), batch_size=1)
    model, data = accelerator.prepare(model, data)
    seen = []
    for x in data:
        with accelerator.accumulate(model):
            accelerator.backward(model(x).sum())
            state = GradientState()
            seen.append((state.sync_gradients, state.end_of_dataloader, state.in_dataloader))
    assert seen == [(False, False, True), (True, False, True), (True, True, True)]
    assert not GradientState().in_dataloader and not GradientState().end_of_dataloader
