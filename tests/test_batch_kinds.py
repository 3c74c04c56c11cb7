"""Dispatched batches of every kind: each sample once, or a refusal on every rank."""

import re
from collections import namedtuple
from dataclasses import InitVar, dataclass, field

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence, unpack_sequence
from torch.utils.data import DataLoader
from transformers.modeling_outputs import SequenceClassifierOutput

from ranks import run
from shardwise import Accelerator
from shardwise.errors import DataError
from shardwise.utils import DataLoaderConfiguration


@dataclass
class Derived:
    x: torch.Tensor
    start: InitVar[int]
    doubled: torch.Tensor = field(init=False)

    def __post_init__(self, start):
        self.x = self.x + start
        self.doubled = 2 * self.x


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor


class Own:
    def __init__(self, x):
        self.x = x

    def to(self, device):
        return self


Pair = namedtuple("Pair", "x y")


def lengths(items):
    """A sequence per sample: sample i is i, 1 + i % 3 times, so order and lengths can be told."""
    return pack_sequence([torch.full((1 + i % 3,), i) for i in items], enforce_sorted=False)


def whole(packed):
    sequences = unpack_sequence(packed)
    assert all(s.tolist() == [int(s[0])] * (1 + int(s[0]) % 3) for s in sequences)
    return [int(s[0]) for s in sequences]


def agreed(*columns):
    columns = [[int(v) for v in column] for column in columns]
    assert all(column == columns[0] for column in columns), columns
    return columns[0]


# how the samples are collated, and the samples of a batch
SPLIT = {
    "dataclass": (lambda t: Derived(torch.tensor(t), 0), lambda b: agreed(b.x, b.doubled // 2)),
    "frozen dataclass": (lambda t: Frozen(torch.tensor(t)), lambda b: agreed(b.x)),
    "dataclass with a start": (lambda t: Derived(torch.tensor(t), 5), lambda b: agreed(b.x - 5, b.doubled // 2 - 5)),
    "numpy": (np.array, lambda b: agreed(b)),
    "dict of numpy": (lambda t: {"x": np.array(t), "y": np.array(t)[:, None]}, lambda b: agreed(b["x"], b["y"][:, 0])),
    "tensors and numpy": (lambda t: {"t": torch.tensor(t), "x": np.array(t)}, lambda b: agreed(b["t"], b["x"])),
    "ModelOutput": (lambda t: SequenceClassifierOutput(logits=torch.tensor(t)), lambda b: agreed(b.logits)),
    "PackedSequence": (lengths, whole),
    "PackedSequence and labels": (lambda t: (lengths(t), torch.tensor(t)), lambda b: agreed(whole(b[0]), b[1])),
    "tuple of strings": (lambda t: (torch.tensor(t), tuple(map(str, t))), lambda b: agreed(*b)),
    "columns of strings": (lambda t: {"s": [str(i) for i in t], "n": 3}, lambda b: agreed(b["s"])),
    "strings": (lambda t: tuple(map(str, t)), lambda b: agreed(b)),
    "named tuple": (lambda t: Pair(torch.tensor(t), [str(i) for i in t]), lambda b: agreed(b.x, b.y)),
    "samples as they are": (lambda t: [{"x": torch.full((5,), i)} for i in t], lambda b: [int(s["x"][0]) for s in b]),
    "sparse": (lambda t: (torch.tensor(t) + 1)[:, None].to_sparse(), lambda b: agreed(b.to_dense()[:, 0] - 1)),
}
REFUSED = {
    "own class": (Own, lambda b: b.x, "is a Own"),
    "own class in a dict": (
        lambda t: {"y": torch.tensor(t), "own": Own(t)}, lambda b: b["own"].x, r"\['own'\] in it is a Own",
    ),
    "rows in dim 1": (lambda t: {"x": torch.tensor(t)[None]}, lambda b: b["x"][0].tolist(), r"shape \(1, \d\)"),
    "rows in dim 1 of NumPy": (lambda t: np.array(t)[None], lambda b: b[0].tolist(), r"a ndarray of shape \(1, \d\)"),
    "rows in dims 0 and 1": (
        lambda t: (torch.tensor(t), torch.tensor(t).expand(3, -1)), lambda b: b[1][0].tolist(), r"\[1\] in it is a T"
    ),
    "nested": (lambda t: torch.nested.as_nested_tensor([torch.tensor([i]) for i in t], layout=torch.jagged),
               lambda b: [int(x) for x in b.unbind()], "nested"),
}  # fmt: skip


def reading(kind, split, length, even, slice_fn=None):
    collate, samples = (SPLIT | REFUSED)[kind][:2]
    config = DataLoaderConfiguration(dispatch_batches=True, split_batches=split, even_batches=even)
    accelerator = Accelerator(cpu=True, dataloader_config=config)
    loader = DataLoader(range(length), batch_size=4 if split else 2, collate_fn=collate)
    loader = accelerator.prepare_data_loader(loader, slice_fn_for_dispatch=slice_fn)
    try:
        mine, metrics = [], []
        for batch in loader:
            mine.append(samples(batch))
            metrics += accelerator.gather_for_metrics(torch.tensor(mine[-1])).tolist()
    except DataError as error:
        return str(error), []
    return mine, metrics


def all_of(kinds, split, slice_fn=None):
    """Of every kind, length and ``even_batches``: the rank's batches, and what gather_for_metrics finds."""
    cases = [(kind, length, even) for kind in kinds for length in (8, 7, 5) for even in (True, False)]
    return {case: reading(case[0], split, case[1], case[2], slice_fn) for case in cases}


def check(ranks):
    first, second = ranks
    for case in first:
        (_, length, even), (mine, metrics), (other, same) = case, first[case], second[case]
        assert isinstance(mine, list) and isinstance(other, list), (case, mine, other)
        seen = sorted(x for batch in mine + other for x in batch)
        assert sorted(set(seen)) == list(range(length)), case
        assert even or len(seen) == length, (case, seen)
        assert not even or len(mine) == len(other), case
        assert sorted(metrics) == list(range(length)), (case, metrics)
        assert same == metrics or not even, case


@pytest.mark.parametrize("split", [False, True], ids=["deal", "split"])
def test_every_sample_comes_once(split):
    ranks = run(2, all_of, list(SPLIT), split)
    check(ranks)
    sizes = {len(batch) for found in ranks for case in found if case[2] for batch in found[case][0]}
    assert sizes == {2}  # with even_batches


def test_what_cannot_be_cut_is_dealt_as_it_is():
    check(run(2, all_of, list(REFUSED), False))


def test_what_cannot_be_cut_is_refused_on_every_rank():
    for rank, found in enumerate(run(2, all_of, list(REFUSED), True)):
        for case, (error, _) in found.items():
            assert isinstance(error, str), (rank, case, error)
            assert re.search(REFUSED[case[0]][2], error) and "pass slice_fn_for_dispatch" in error, (case, error)
            assert ("rank 0 could not read" in error) == (rank == 1), error


def own_part(batch, part, process_index, num_processes):
    return Own(batch.x[part])


def test_an_own_class_is_cut_by_the_users_function():
    check(run(2, all_of, ["own class"], True, own_part))


@pytest.mark.parametrize("kind", REFUSED)
def test_one_rank_cuts_nothing(kind):
    assert reading(kind, True, 7, True)[0] == [[0, 1, 2, 3], [4, 5, 6]]
