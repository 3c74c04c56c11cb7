"""The classes of the Accelerate door, made by hand, as Accelerate's are: same arguments, attributes, pickles."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, TensorDataset

from models import rank
from ranks import run
from shardwise import Accelerator
from shardwise.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    DataLoaderShard,
    DataLoaderStateMixin,
    IterableDatasetShard,
    SeedableRandomSampler,
    SkipDataLoader,
    prepare_data_loader,
    skip_first_batches,
)
from shardwise.errors import DataError, MissingPackage, OptimizerError
from shardwise.optimizer import AcceleratedOptimizer
from shardwise.scheduler import AcceleratedScheduler
from shardwise.state import AcceleratorState, GradientState
from shardwise.utils import GradientAccumulationPlugin, send_to_device

DATA = list(range(10))


def values(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [value for batch in batches for value in batch]


# --- loaders ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [DataLoaderShard, DataLoaderDispatcher])
@pytest.mark.parametrize("stateful", [False, True])
def test_loaders_are_made_of_a_dataset(kind, stateful):
    if stateful:
        pytest.importorskip("torchdata")
    loader = kind(DATA, batch_size=4, skip_batches=1, use_stateful_dataloader=stateful, iteration=3)
    assert values(loader) == [[4, 5, 6, 7], [8, 9]] and len(loader) == 3
    assert loader.use_stateful_dataloader is stateful and loader.iteration == 3
    assert isinstance(loader, kind) and isinstance(loader, DataLoader) and isinstance(loader, DataLoaderStateMixin)
    assert isinstance(loader, type(loader.base_dataloader)), "as torchdata's class is looked for"
    assert loader.total_dataset_length == 10 and loader.total_batch_size == 4
    assert values(kind(DATA, batch_size=4, drop_last=True)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize("stateful", [False, True])
def test_batches_are_skipped_of_a_dataset_or_a_loader(stateful):
    if stateful:
        pytest.importorskip("torchdata")
    loader = SkipDataLoader(DATA, batch_size=4, skip_batches=2, use_stateful_dataloader=stateful)
    assert values(loader) == [[8, 9]] and len(loader) == 1 and loader.use_stateful_dataloader is stateful
    assert isinstance(loader, type(loader.base_dataloader))
    assert values(SkipDataLoader(DataLoader(DATA, batch_size=4), 2)) == [[8, 9]]
    with pytest.raises(DataError, match="batch_size would be for a new one"):
        SkipDataLoader(DataLoader(DATA), batch_size=3)


def test_what_a_loader_cannot_be_made_with(monkeypatch):
    import sys

    for kind in (DataLoaderShard, DataLoaderDispatcher):
        with pytest.raises(DataError, match="torch_device_mesh"):
            kind(DATA, torch_device_mesh=object())
    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    for kind in (DataLoaderShard, DataLoaderDispatcher, SkipDataLoader):
        with pytest.raises(ImportError, match="torchdata") as caught:
            kind(DATA, use_stateful_dataloader=True)
        assert isinstance(caught.value, MissingPackage)


class Mine(DataLoader):
    def hello(self) -> str:
        return "hello"


def test_a_prepared_loader_is_one_of_the_scripts_class():
    loader = prepare_data_loader(Mine(DATA, batch_size=2))
    assert isinstance(loader, Mine) and loader.hello() == "hello"
    assert {"hello", "set_epoch", "batch_size"} <= set(dir(loader))


def counts_by_hand(kind: str) -> tuple[list[Any], list[Any]]:
    """A loader that nobody prepared ends the window, and results of repeated samples are left out."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(nn.Linear(1, 1))
    state = GradientState()
    samples = torch.arange(10.0).reshape(-1, 1)
    if kind == "dispatched":
        loader: Any = DataLoaderDispatcher(samples, batch_size=2)
    elif kind == "shard":
        batches = BatchSampler(range(10), 2, False)
        shard = BatchSamplerShard(batches, accelerator.num_processes, accelerator.process_index)
        loader = DataLoaderShard(samples, batch_sampler=shard)
    else:
        loader = Own(samples, state)
    seen, gathered = [], []
    for batch in loader:
        assert state.in_dataloader and state.active_dataloader is loader
        with accelerator.accumulate(model):
            accelerator.backward(model(batch).sum())
            seen.append((accelerator.sync_gradients, state.end_of_dataloader))
        gathered += accelerator.gather_for_metrics(batch).flatten().tolist()
    assert not state.in_dataloader and loader.gradient_state.num_steps == 2
    return seen, gathered


class Own(DataLoaderStateMixin):
    """A script's own loader: this rank's half of each round, the last one filled up."""

    def __init__(self, samples: torch.Tensor, state: GradientState) -> None:
        self.dataset, self.gradient_state, self.total_batch_size = samples, state, 4

    def __iter__(self) -> Any:
        self.begin()
        padded = torch.cat([self.dataset, self.dataset[:2]])
        for start in (0, 4, 8):
            self.end_of_dataloader = start == 8
            yield padded[start + 2 * rank() :][:2]
        self.end()


@pytest.mark.parametrize("kind", ["shard", "dispatched", "own"])
def test_a_loader_made_by_hand_is_counted(kind):
    for seen, gathered in run(2, counts_by_hand, kind):
        assert seen == [(False, False), (True, False), (True, True)]
        assert gathered == DATA


def test_a_loader_belongs_to_the_accelerator_that_prepares_it():
    first = Accelerator(cpu=True)
    loader = first.prepare(DataLoaderShard(DATA, batch_size=5))
    second = Accelerator(cpu=True)
    for _ in loader:
        assert first.gradient_state.in_dataloader and not second.gradient_state.in_dataloader


class Batches(Sampler):
    """A batch sampler that draws from the global random state, and keeps its epoch."""

    def __init__(self) -> None:
        self.epoch, self.batch_size = 0, 2

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Any:
        return iter(torch.randperm(10).reshape(5, 2).tolist())


def sees_its_own() -> tuple[list[Any], list[Any]]:
    mine = Batches()
    loader = Accelerator(cpu=True).prepare(DataLoader(DATA, batch_sampler=mine))
    assert loader.batch_sampler.batch_sampler is mine
    loader.set_epoch(4)
    assert mine.epoch == 4
    torch.manual_seed(rank())  # orders agree whatever the ranks draw
    first, second = values(loader), values(loader)
    assert first != second and mine.epoch == 5
    return first, second


def test_a_scripts_batch_sampler_stays_visible():
    zero, one = run(2, sees_its_own)
    for ours, theirs in zip(zero, one, strict=True):
        assert sorted(flat(ours + theirs[:2])) == DATA

    sampler = BatchSampler(RandomSampler(DATA), 2, False)
    loader = prepare_data_loader(DataLoader(DATA, batch_sampler=sampler))
    assert isinstance(loader.batch_sampler.batch_sampler, BatchSampler)
    assert isinstance(loader.batch_sampler.sampler, RandomSampler)


@pytest.mark.parametrize("kind", [DataLoaderShard, DataLoaderDispatcher])
def test_a_sampler_that_is_copied_is_told_the_epoch(kind):
    sampler = SeedableRandomSampler(DATA, data_seed=3)
    loader = kind(DATA, batch_sampler=BatchSampler(sampler, 2, False))
    loader.set_epoch(1)
    next(iter(skip_first_batches(loader, 2)))
    assert sampler.epoch == 1 and sampler.initial_seed == 3


def test_another_sampler_gives_another_order():
    loader = prepare_data_loader(DataLoader(DATA, batch_size=5))
    assert values(loader) == [DATA[:5], DATA[5:]]
    loader.set_sampler(SeedableRandomSampler(DATA, data_seed=7))
    orders = [flat(values(loader)) for _ in range(2)]
    assert sorted(orders[0]) == DATA and orders[0] != DATA and orders[0] != orders[1]
    assert loader.get_sampler().initial_seed == 7
    plain = prepare_data_loader(DataLoader(DATA, batch_size=None))
    plain.set_sampler(range(9, -1, -1))
    assert list(plain) == DATA[::-1]
    with pytest.raises(DataError, match="without a sampler"):
        prepare_data_loader(DataLoader(Stream())).set_sampler(range(3))


def test_a_seedable_sampler_is_shown_and_shuffles_alike():
    def loader(seedable: bool) -> Any:
        return prepare_data_loader(
            DataLoader(DATA, batch_size=2, shuffle=True), use_seedable_sampler=seedable, data_seed=5
        )

    seedable, plain = loader(True), loader(False)
    assert isinstance(seedable.batch_sampler.batch_sampler.sampler, SeedableRandomSampler)
    assert isinstance(seedable.get_sampler(), SeedableRandomSampler)
    for _ in range(2):
        assert values(seedable) == values(plain)
    expected = DataLoader(DATA, batch_size=2, sampler=SeedableRandomSampler(DATA, data_seed=5))
    assert values(loader(True)) == values(expected)


class Stream(IterableDataset):
    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        return iter(DATA)


def test_the_shard_of_a_stream_tells_it_the_epoch():
    stream = Stream()
    shard = IterableDatasetShard(stream, batch_size=2, num_processes=2, process_index=1)
    shard.set_epoch(6)
    assert stream.epoch == 6 and list(shard) == [2, 3, 6, 7, 0, 1]


# --- pickles ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dispatch", [False, True])
def test_loaders_can_be_pickled(dispatch):
    data = TensorDataset(torch.arange(10))
    loader = prepare_data_loader(DataLoader(data, shuffle=True), dispatch_batches=dispatch, data_seed=1)
    skipping = skip_first_batches(loader, 2)
    for again in (pickle.loads(pickle.dumps(loader)), copy.deepcopy(loader)):
        assert type(again) is type(loader) and list(again) == list(prepare_again(data, dispatch))
    again = pickle.loads(pickle.dumps(skipping))
    assert isinstance(again, SkipDataLoader) and list(again) == list(prepare_again(data, dispatch))[2:]


def prepare_again(data: Any, dispatch: bool) -> Any:
    return prepare_data_loader(DataLoader(data, shuffle=True), dispatch_batches=dispatch, data_seed=1)


def test_an_accelerator_can_be_pickled_with_what_it_prepared():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = accelerator.prepare(DataLoader(DATA, batch_size=4))
    again = pickle.loads(pickle.dumps(accelerator))
    assert again.gradient_accumulation_steps == 2 and again.mixed_precision == "no"
    (found,) = again._dataloaders
    model = again.prepare(nn.Linear(1, 1))
    ends = []
    for batch in found:
        with again.accumulate(model):
            again.backward(model(batch.float().reshape(-1, 1)).sum())
            ends.append(again.sync_gradients)
    assert ends == [False, True, True] and values(loader) == values(found)


def test_optimizers_and_schedulers_can_be_pickled():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.5)
    prepared, schedule = accelerator.prepare(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1))
    model(torch.ones(1, 1)).sum().backward()
    prepared.step()
    schedule.step()
    again, other = pickle.loads(pickle.dumps((prepared, schedule)))
    assert str(again.state_dict()) == str(prepared.state_dict()) and again.param_groups[0]["lr"] == 0.05
    assert other.get_last_lr() == [0.05] and other.optimizers == [again]


# --- optimizers and schedulers ---------------------------------------------------------------------
def test_an_optimizer_made_by_hand_steps_where_the_accelerator_says():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(nn.Linear(1, 1))
    optimizer = AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
    schedule = AcceleratedScheduler(torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1, 0.5), optimizer)
    before, rates = model.weight.item(), []
    for _ in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.ones(1, 1)).sum())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        rates.append((schedule.get_last_lr()[0], model.weight.item()))
    assert rates == [(1.0, before), (0.5, before - 1.0)]
    assert optimizer.gradient_state.num_steps == schedule.gradient_state.num_steps == 2 and optimizer.scaler is None
    with pytest.raises(OptimizerError, match="loss scaler of its own"):
        AcceleratedOptimizer(optimizer.optimizer, scaler=torch.amp.GradScaler("cpu"))


def test_a_schedule_that_has_ended_stays_there():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inner = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=3)
    optimizer, schedule = accelerator.prepare(optimizer, inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            optimizer.step()
            schedule.step()
    with pytest.raises(ValueError, match="Tried to step 4"):
        inner.step()
    last = schedule.get_last_lr()
    with pytest.warns(UserWarning, match="OneCycleLR has ended after total_steps=3"):
        schedule.step()
    schedule.step()
    assert schedule.get_last_lr() == last


# --- states ----------------------------------------------------------------------------------------
def test_gradient_state_is_the_last_accelerators():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    state = GradientState()
    assert state.initialized and state.plugin_kwargs["num_steps"] == 3 and state.adjust_scheduler
    accelerator.sync_gradients = False
    assert not state.sync_gradients
    state._set_sync_gradients(True)
    assert accelerator.sync_gradients
    GradientState(GradientAccumulationPlugin(num_steps=5, sync_with_dataloader=False, sync_each_batch=True))
    assert accelerator.gradient_accumulation_steps == 5
    assert not state.sync_with_dataloader and state.plugin_kwargs["sync_each_batch"]
    assert AcceleratorState().mixed_precision == "no"


def test_a_loop_that_counts_itself_says_when_to_step():
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(1, 1, bias=False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    before = model.weight.item()
    for boundary in (False, True):
        accelerator.gradient_state._set_sync_gradients(boundary)
        accelerator.backward(model(torch.ones(1, 1)).sum())
        optimizer.step()
        optimizer.zero_grad()
    assert model.weight.item() == pytest.approx(before - 2) and model.weight.grad is None


def test_settings_of_an_accelerator_are_not_changed_by_its_state():
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    assert AcceleratorState(mixed_precision="bf16", cpu=True, fsdp_plugin=None).strategy == accelerator.strategy
    for settings in ({"mixed_precision": "fp16"}, {"fsdp_plugin": object()}, {"unknown": 3}):
        with pytest.raises(ValueError, match="another " + next(iter(settings))):
            AcceleratorState(**settings)
    assert AcceleratorState().mixed_precision == "bf16"


def test_without_an_accelerator_gradient_states_are_one(monkeypatch):
    GradientState._reset_state()
    GradientState(GradientAccumulationPlugin(num_steps=4))
    assert GradientState().num_steps == 4 and GradientState().sync_gradients
    Accelerator(cpu=True)
    assert GradientState().num_steps == 1


def test_all_that_cannot_be_registered_is_named():
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ValueError, match=r"object 0, a Tensor; object 2, a list\n"):
        accelerator.register_for_checkpointing(torch.ones(1), nn.Linear(1, 1), [])
    assert not accelerator._custom_objects


@pytest.mark.parametrize("backend", ["EAGER", "NO"])
def test_models_are_compiled_as_accelerates_launcher_was_told(backend, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "True")
    model = Accelerator(cpu=True).prepare(nn.Sequential(nn.Linear(2, 2)))
    assert (model._compiled_call_impl is not None) == (backend == "EAGER")
    assert torch.isfinite(model(torch.ones(1, 2))).all()


# --- others ----------------------------------------------------------------------------------------
@pytest.mark.slow
def test_send_to_device_compiles():
    moved = torch.compile(send_to_device, fullgraph=True, backend="eager")({"a": torch.ones(1)}, "cpu")
    assert moved["a"].tolist() == [1.0]
