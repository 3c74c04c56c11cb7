"""Loaders that were split over the ranks before they are prepared: every sample is read, and counted once."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Sampler

from models import rank, world
from ranks import run
from shardwise import Accelerator
from shardwise.data_loader import skip_first_batches
from shardwise.errors import DataError
from shardwise.utils import DataLoaderConfiguration
from slowly import in_turn


class Around(Sampler):
    """A sampler that holds another one under some name."""

    def __init__(self, name, inner, keep=lambda index: True):
        self.name, self.keep = name, keep
        setattr(self, name, inner)

    def __iter__(self):
        return (index for index in getattr(self, self.name) if self.keep(index))

    def __len__(self):
        return sum(map(self.keep, getattr(self, self.name)))


class Unpadded(DistributedSampler):
    """As evaluation samplers do it: nothing is repeated, and the ranks' shares differ in length."""

    def __init__(self, data):
        super().__init__(data, world(), rank(), shuffle=False)
        self.total_size, self.num_samples = len(data), len(range(rank(), len(data), world()))

    def __iter__(self):
        return iter(range(self.rank, self.total_size, self.num_replicas))


class Own(DistributedSampler):
    """Sets up nothing of its base: which share it reads is its own affair."""

    def __init__(self, data):
        self.length = len(data)

    def __iter__(self):
        return iter(range(self.length)[rank() :: world()])

    def __len__(self):
        return len(range(self.length)[rank() :: world()])


class Node(IterableDataset):
    """A stream as ``datasets.distributed.split_dataset_by_node`` leaves it."""

    def __init__(self, n, mark="_distributed"):
        self.n = n
        setattr(self, mark, SimpleNamespace(rank=rank(), world_size=world()))

    def __iter__(self):
        return iter(range(self.n)[rank() :: world()])


class Outer(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return iter(self.dataset)


def distributed(data, **options):
    return DistributedSampler(data, world(), rank(), **{"shuffle": False, **options})


KINDS = {
    "sampler": lambda d: DataLoader(d, sampler=distributed(d), batch_size=2),
    "shuffled": lambda d: DataLoader(d, sampler=distributed(d, shuffle=True), batch_size=2),
    "batch sampler": lambda d: DataLoader(d, batch_sampler=BatchSampler(distributed(d), 2, False)),
    "single": lambda d: DataLoader(d, sampler=distributed(d), batch_size=None),
    "batches by sampler": lambda d: DataLoader(
        torch.tensor(d), sampler=BatchSampler(distributed(d), 2, False), batch_size=None
    ),
    ".sampler": lambda d: DataLoader(d, sampler=Around("sampler", distributed(d)), batch_size=2),
    ".base_sampler": lambda d: DataLoader(d, 2, sampler=Around("base_sampler", distributed(d, shuffle=True))),
    "._sampler": lambda d: DataLoader(d, batch_sampler=BatchSampler(Around("_sampler", distributed(d)), 2, False)),
    "unpadded": lambda d: DataLoader(d, sampler=Unpadded(d), batch_size=2),
    "own": lambda d: DataLoader(d, sampler=Own(d), batch_size=2),
    "stream": lambda d: DataLoader(Node(len(d)), batch_size=2),
    "stream, other mark": lambda d: DataLoader(Node(len(d), "distributed"), batch_size=2),
    "stream inside": lambda d: DataLoader(Outer(Node(len(d))), batch_size=2),
    "stream, single": lambda d: DataLoader(Node(len(d)), batch_size=None),
}
LENGTHS = (16, 15, 9, 5, 2)


def read(kind, even):
    acc = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=even))
    out = {}
    for n in LENGTHS:
        loader = acc.prepare(KINDS[kind](list(range(n))))
        epochs = []
        for _ in range(2):
            mine, kept = [], []
            for batch in loader:
                batch = torch.as_tensor(batch).reshape(-1)
                mine.append(batch.tolist())
                kept += acc.gather_for_metrics(batch).tolist()
            epochs.append((mine, kept))
        out[n] = epochs
    return out


@in_turn(even=[True, False], kind=KINDS)
def test_nothing_is_split_twice(kind, even):
    ranks = run(2, read, kind, even)
    for n in LENGTHS:
        for epoch in range(2):
            parts = [out[n][epoch][0] for out in ranks]
            assert {v for part in parts for batch in part for v in batch} == set(range(n))
            if even or not kind.startswith(("stream", "unpadded", "own")):
                assert [len(b) for b in parts[0]] == [len(b) for b in parts[1]]
            # A rank that has run out does not take part; the others go on.
            longest = max((out[n][epoch][1] for out in ranks), key=len)
            assert sorted(longest) == list(range(n))
    if kind in ("shuffled", ".base_sampler"):
        assert ranks[0][16][0] != ranks[0][16][1]


def kept_of(acc, loader):
    return sorted(v for batch in loader for v in acc.gather_for_metrics(batch).tolist())


def places():
    acc, data = Accelerator(cpu=True), list(range(15))
    out = {}
    for kind in ("batch sampler", "stream"):
        loader = acc.prepare(KINDS[kind](data))
        next(iter(loader))
        state = loader.state_dict()
        other = acc.prepare(KINDS[kind](data))
        other.load_state_dict(state)
        out[kind] = kept_of(acc, other), kept_of(acc, skip_first_batches(acc.prepare(KINDS[kind](data)), 1))
    out["skipped before"] = kept_of(acc, acc.prepare(skip_first_batches(KINDS["batch sampler"](data), 1)))
    return out


def test_going_on_in_the_middle():
    for out in run(2, places):
        assert out["batch sampler"] == out["stream"] == (list(range(4, 15)), list(range(4, 15)))
        assert out["skipped before"] == list(range(4, 15))


def others():
    acc, data = Accelerator(cpu=True), list(range(12))
    only = DataLoader(data, sampler=Around("sampler", distributed(data), lambda v: v != 4), batch_size=2)
    crossed = DataLoader(data[:11], sampler=DistributedSampler(data[:11], 2, 1 - rank(), shuffle=False), batch_size=2)
    dropping = DataLoader(data[:11], sampler=distributed(data[:11]), batch_size=4, drop_last=True)
    one = DataLoader(data, sampler=DistributedSampler(data, 1, 0, shuffle=False), batch_size=2)
    found = [kept_of(acc, acc.prepare(loader)) for loader in (only, crossed, dropping, one)]
    errors = []
    dispatching = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    same = DistributedSampler(data, 2, 0)
    more = DistributedSampler(data, 4, rank())
    for wanted, loader in (
        *((dispatching, make(data)) for make in KINDS.values()),
        (acc, DataLoader(data, sampler=same)), (acc, DataLoader(data, sampler=more)),
    ):  # fmt: skip
        with pytest.raises(DataError) as caught:
            wanted.prepare(loader)
        errors.append(caught.value.fix is not None)
    with pytest.raises(DataError, match="rank 1 has got none"):
        list(acc.prepare(DataLoader(Node(1), batch_size=2)))
    return found, errors


def test_filters_crossed_ranks_and_refusals():
    for found, errors in run(2, others):
        assert found[0] == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]  # the wrapper leaves out one
        assert found[1] == list(range(11))
        assert found[2] == list(range(8))
        assert found[3] == list(range(12))  # a sampler of one replica reads all, and is shared here
        assert len(errors) == len(KINDS) + 2 and all(errors)
