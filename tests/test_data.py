"""Dataloaders: every sample once, on some rank, in an order that can be taken up again in the middle."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import pickle
import random
import warnings
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    get_worker_info,
)

from models import rank, world
from ranks import run
from shardwise.data_loader import (
    BatchSamplerShard,
    DataLoaderDispatcher,
    DataLoaderShard,
    IterableDatasetShard,
    SeedableRandomSampler,
    SkipDataLoader,
    gather_for_metrics,
    get_sampler,
    prepare_data_loader,
    skip_first_batches,
)
from shardwise.errors import DataError, MissingPackage, ShardwiseError
from shardwise.utils import DataLoaderConfiguration
from slowly import in_turn, slow

STATEFUL = importlib.util.find_spec("torchdata") is not None
needs_torchdata = pytest.mark.skipif(not STATEFUL, reason="needs torchdata")


def everywhere(size, function, *args):
    """On every rank of a world of ``size``; a world of one is this process."""
    return [function(*args)] if size == 1 else run(size, function, *args)


def allow_workers():
    """The pool's ranks are daemons, which multiprocessing lets have no children."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]


class Stream(IterableDataset):
    """``range(n)``, or a shuffle of it with all three global random states; split over worker processes."""

    def __init__(self, n, shuffled=False):
        self.n, self.shuffled = n, shuffled

    def __len__(self):
        return self.n

    def __iter__(self):
        worker = get_worker_info()
        items = list(range(self.n))[worker.id :: worker.num_workers] if worker is not None else list(range(self.n))
        if not self.shuffled:
            yield from map(torch.tensor, items)
            return
        items = [items[i] for i in torch.randperm(len(items))]
        np.random.shuffle(items)
        while items:  # drawn as it goes, not in advance
            yield torch.tensor(items.pop(random.randrange(len(items))))


# --- which samples are whose -------------------------------------------------------------------
def once(parts, tails):
    """The samples of all ranks, round by round, without those that are said to be repeats."""
    seen = []
    for i in range(max(map(len, parts), default=0)):
        tail = next((t[i] for t in tails if i < len(t)), None)
        for r, part in enumerate(parts):
            if i < len(part):
                assert tail is None or len(part[i]) == tail.rows[r]
                seen += part[i][: len(part[i]) - (tail.repeated[r] if tail else 0)]
            else:
                assert tail is not None and tail.rows[r] == 0
    return seen


@settings(max_examples=300, deadline=None)
@given(
    samples=st.integers(0, 40), ranks=st.integers(1, 5), size=st.integers(1, 6), split=st.booleans(),
    even=st.booleans(), drop_last=st.booleans(), start=st.integers(0, 5),
)  # fmt: skip
def test_batch_shards_give_every_sample_once(samples, ranks, size, split, even, drop_last, start):
    batches = BatchSampler(range(samples), size * ranks if split else size, drop_last)
    shards = [BatchSamplerShard(batches, ranks, r, split, even) for r in range(ranks)]
    parts = [list(s) for s in shards]
    tails = [list(s.rounds) for s in shards]
    seen = once(parts, tails)
    step = ranks * size
    whole = samples // step * step
    if drop_last:
        assert seen == list(range(whole)) or not even
        assert len(seen) >= whole
    else:
        assert seen == list(range(samples))
    assert [len(s) for s in shards] == [len(p) for p in parts]
    if even and ranks > 1:
        assert {len(p) for p in parts} == {-(-samples // step) if not drop_last else whole // step}
        assert all(len(b) == size for p in parts for b in p)
    again = [BatchSamplerShard(batches, ranks, r, split, even) for r in range(ranks)]
    for s in again:
        s.start = start * s.per_round
    assert [list(s) for s in again] == [p[start:] for p in parts]


@settings(max_examples=100, deadline=None)
@given(samples=st.integers(0, 30), ranks=st.integers(1, 4), size=st.integers(1, 5), skipped=st.integers(0, 3))
def test_iterable_shards_give_every_item_once(samples, ranks, size, skipped):
    for split in (False, True):
        for even in (False, True):
            for drop_last in (False, True):
                total = size * ranks if split else size
                options = {"batch_size": total, "drop_last": drop_last, "num_processes": ranks}
                shards = [
                    IterableDatasetShard(Stream(samples), process_index=r, split_batches=split, **options)
                    for r in range(ranks)
                ]
                for s in shards:
                    s.even_batches = even
                parts = [[int(x) for x in s] for s in shards]
                assert [len(s) for s in shards] == [len(p) for p in parts]
                whole = samples // (ranks * size) * ranks * size
                rounds = [[p[i : i + size] for i in range(0, len(p), size)] for p in parts]
                last = [[None] * (len(r) - 1) + [s.tail] for r, s in zip(rounds, shards, strict=True)]
                assert once(rounds, last) == list(range(whole if drop_last else samples))
                for s, p in zip(shards, parts, strict=True):
                    s.skip(skipped * ranks * size)
                    assert [int(x) for x in s] == p[skipped * size :]


def test_batches_of_no_particular_size():
    class Odd:
        def __iter__(self):
            return iter([[0], [1, 2, 3], [4, 5], [6], [7, 8]])

        def __len__(self):
            return 5

    shards = [BatchSamplerShard(Odd(), 2, r) for r in range(2)]
    parts = [list(s) for s in shards]
    assert parts == [[[0], [4, 5], [7, 8]], [[1, 2, 3], [6], [0]]]
    assert once(parts, [list(s.rounds) for s in shards]) == list(range(9))
    with pytest.raises(DataError, match="split_batches cuts batches of None"):
        BatchSamplerShard(Odd(), 2, 0, split_batches=True)
    with pytest.raises(DataError, match="split_batches cuts batches of 3"):
        IterableDatasetShard(Stream(4), 3, False, 2, 0, split_batches=True)


# --- through dataloaders, and back by gather_for_metrics ---------------------------------------
def prepared(loader, **options):
    return prepare_data_loader(loader, torch.device("cpu"), put_on_device=True, **options)


def reading(kind, samples, size, options, workers=0):
    torch.manual_seed(rank())  # the ranks' own random states must not matter
    allow_workers()
    if kind == "iterable":
        loader = DataLoader(Stream(samples), batch_size=size, num_workers=workers)
    else:
        loader = DataLoader(torch.arange(samples), batch_size=size, shuffle=kind == "shuffled", num_workers=workers)
    loader = prepared(loader, **options)
    epochs = []
    for _ in range(1 if workers else 2):
        raw, kept, objects, ends = [], [], [], []
        for x in loader:
            raw.append(x.tolist())
            out = gather_for_metrics({"x": x, "pairs": torch.stack([x, x], 1)}, loader.tail())
            assert torch.equal(out["pairs"][:, 0], out["x"])
            kept += out["x"].tolist()
            objects += gather_for_metrics([str(int(v)) for v in x], loader.tail())
            ends.append(loader.end_of_dataloader)
        assert ends == [False] * (len(ends) - 1) + [True]
        assert len(loader) == len(ends) or workers
        assert objects == [str(v) for v in kept]
        epochs.append((raw, kept))
    if not workers:
        loader.set_epoch(0)
        assert [x.tolist() for x in loader] == epochs[0][0]
    return epochs


MODES = {
    "plain": ("plain", {}),
    "shuffled": ("shuffled", {}),
    "shuffled, dispatched": ("shuffled", {"dispatch_batches": True}),
    "shuffled, seedable": ("shuffled", {"use_seedable_sampler": True, "data_seed": 7}),
    "iterable, dispatched": ("iterable", {}),
    "iterable, sharded": ("iterable", {"dispatch_batches": False}),
    "iterable, dispatched, split": ("iterable", {"split_batches": True}),
    "iterable, sharded, split": ("iterable", {"split_batches": True, "dispatch_batches": False}),
    "plain, split": ("plain", {"split_batches": True}),
    "plain, dispatched, split": ("plain", {"split_batches": True, "dispatch_batches": True}),
}


@in_turn(mode=MODES, size=[1, 2, 3])
def test_every_sample_once(size, mode):
    kind, options = MODES[mode]
    for samples in (1, 3, 13, 18):
        ranks = everywhere(size, reading, kind, samples, 6 if "split" in mode else 3, options)
        each = 6 // size if "split" in mode else 3
        for epoch in range(2):
            assert all(r[epoch][1] == ranks[0][epoch][1] for r in ranks)
            order = ranks[0][epoch][1]
            assert sorted(order) == list(range(samples))
            assert (order == sorted(order)) == (kind != "shuffled") or samples <= 3
            if size > 1:
                assert len({len(r[epoch][0]) for r in ranks}) == 1
                assert {len(b) for r in ranks for b in r[epoch][0]} == {each}
        assert kind != "shuffled" or samples <= 3 or ranks[0][0][1] != ranks[0][1][1]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("shuffled", {"even_batches": False}), ("iterable", {}), ("iterable", {"dispatch_batches": False})],
)
def test_every_sample_once_with_workers(kind, options):
    for epochs in run(2, reading, kind, 12 if options.get("even_batches") is False else 13, 2, options, 2):
        for _, kept in epochs:
            assert sorted(kept) == list(range(len(kept))) and len(kept) >= 12


def by_the_accelerator(samples, options):
    from shardwise import Accelerator

    accelerator = Accelerator(cpu=True, **options)
    out = []
    for data in (torch.arange(samples), Stream(samples)):
        loader = accelerator.prepare(DataLoader(data, batch_size=2 * world()))
        assert accelerator.prepare(loader) is loader
        assert accelerator.skip_first_batches(loader, 1).base_dataloader is loader
        out.append([])
        for x in loader:
            out[-1] += accelerator.gather_for_metrics(x).tolist()
    return out


@pytest.mark.parametrize("options", [{}, {"split_batches": True}, {"even_batches": False}], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_sample_once_by_the_accelerator(size, options):
    for samples in (5, 24):
        ranks = everywhere(size, by_the_accelerator, samples, options)
        assert ranks[0] == [list(range(samples))] * 2
        assert options.get("even_batches") is False or ranks == [ranks[0]] * size


def nests(data, options):
    """What is joined in each form, and whether the forms are kept; the order of a dict's keys may differ."""
    from shardwise import Accelerator

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
    out = {name: [] for name in ("pairs", "dict", "mixed", "tokens", "batch", "rows", "objects", "nothing")}
    for x in accelerator.prepare(DataLoader(data, batch_size=2)):
        p, q = [f"p{int(v)}" for v in x], [f"q{int(v)}" for v in x]
        gather = accelerator.gather_for_metrics
        pairs = gather((p, tuple(q)))
        assert type(pairs) is tuple and len(pairs) == 2
        out["pairs"] += zip(*pairs, strict=True)
        keyed = [("p", p), ("inner", {"q": q, "x": x})]
        both = gather(dict(keyed[:: 1 if rank() else -1]))
        assert both.keys() == {"p", "inner"} and both["inner"].keys() == {"q", "x"}
        out["dict"] += zip(both["p"], both["inner"]["q"], both["inner"]["x"].tolist(), strict=True)
        mixed = gather(Answer(x * 2, q))
        assert type(mixed) is Answer and mixed.guess.device == x.device
        out["mixed"] += zip(mixed.guess.tolist(), mixed.text, strict=True)
        out["tokens"] += gather([[int(v)] * 2 for v in x])
        tensor, text = gather([x, tuple(p)])  # what a collate function makes of (number, text) samples
        out["batch"] += zip(tensor.tolist(), text, strict=True)
        out["rows"] += [int(v) for v in gather(x, use_gather_object=True)]
        out["objects"].append(len(gather({"mean": float(x.float().mean())})))
        out["nothing"] += gather([] if rank() else ["only rank 0's"])
    return out


class Answer(NamedTuple):
    guess: torch.Tensor
    text: list


@pytest.mark.parametrize("options", [{}, {"dispatch_batches": True}, {"even_batches": False}], ids=str)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_tuples_and_dicts_of_lists_lose_no_sample_and_keep_their_form(size, options):
    for samples in (3, 7):
        for data in (torch.arange(samples), Stream(samples)):
            for out in everywhere(size, nests, data, options)[: 1 if "even_batches" in options else size]:
                assert out["pairs"] == [(f"p{v}", f"q{v}") for v in range(samples)]
                assert out["dict"] == [(f"p{v}", f"q{v}", v) for v in range(samples)]
                assert out["mixed"] == [(2 * v, f"q{v}") for v in range(samples)]
                assert out["tokens"] == [[v, v] for v in range(samples)]
                assert out["batch"] == [(v, f"p{v}") for v in range(samples)]
                assert out["rows"] == list(range(samples))
                assert len(out["nothing"]) == len(out["objects"])  # once a round


def kinds_that_differ():
    told = []
    for mine in ((torch.ones(1), "text"), (("a",), torch.ones(1)), ({"p": ["a"]}, {"q": ["a"]})):
        with pytest.raises(ShardwiseError) as error:
            gather_for_metrics(mine[rank()], None)
        told.append(str(error.value))
    return told, gather_for_metrics([rank()], None)


def test_nests_that_differ_raise_on_every_rank():
    for told, after in run(2, kinds_that_differ):
        assert after == [0, 1]
        assert "rank 1 calls gather_for_metrics of objects while rank 0 calls gather" in told[0]
        assert "rank 1 calls gather while rank 0 calls gather_for_metrics of objects" in told[1]
        assert "['p']" in told[2] and "['q']" in told[2]


def two_loaders(first, second, how):
    from shardwise import Accelerator

    accelerator = Accelerator(cpu=True)
    a, b = (accelerator.prepare(DataLoader(torch.arange(n), batch_size=2)) for n in (first, second))
    seen = []
    if how == "zipped":
        for x, y in zip(a, b, strict=False):
            seen += accelerator.gather_for_metrics(x + 0 * len(y)).tolist()
    elif how == "nested":  # an evaluation inside the loop, also at its last batch
        for x in a:
            for y in b:
                seen += accelerator.gather_for_metrics(y).tolist()
            seen += accelerator.gather_for_metrics(x).tolist()
    else:  # a second loader that is taken from when it is wanted
        it = iter(b)
        for x in a:
            y = next(it)
            seen += accelerator.gather_for_metrics(x + 0 * len(y)).tolist()
    return seen


@pytest.mark.parametrize("size", [1, 2])
def test_two_loaders_at_once(size):
    for how in ("zipped", "by hand"):
        assert everywhere(size, two_loaders, 7, 7, how) == [list(range(7))] * size
        assert everywhere(size, two_loaders, 8, 12, how) == [list(range(8))] * size
    once = [*range(5), 0, 1, 2, 3, *range(5), 4, 5, 6] if size == 2 else None
    if size == 2:
        assert everywhere(size, two_loaders, 7, 5, "nested") == [once] * size


def two_that_end_differently(how, first, second):
    with pytest.raises(DataError, match="read at once and end differently") as error:
        two_loaders(first, second, how)
    return str(error.value)


@pytest.mark.parametrize("how", ["zipped", "by hand"])
def test_two_loaders_that_end_differently_raise_on_every_rank(how):
    for lengths in ((7, 5), (3, 4), (4, 3), (7, 20)):
        told = run(2, two_that_end_differently, how, *lengths)
        assert told[0] == told[1] and "accelerator.gather" in told[0]


def uneven(kind, samples, options):
    data = Stream(samples) if kind == "iterable" else torch.arange(samples)
    loader = prepared(DataLoader(data, batch_size=2), even_batches=False, **options)
    kept, text, means, n = [], [], 0, 0
    for x in loader:
        out = gather_for_metrics({"x": x, "y": [x.float() * 2]}, loader.tail())
        assert torch.equal(out["y"][0], out["x"].float() * 2)
        kept += out["x"].tolist()
        text += gather_for_metrics([f"{int(v)}" for v in x], loader.tail())
        means += len(gather_for_metrics(x.float().mean(), loader.tail()))
        n += 1
    assert n == len(loader) or kind == "iterable"
    assert text == [str(v) for v in kept]
    return kept, n


@pytest.mark.parametrize("kind", ["plain", "iterable"])
@pytest.mark.parametrize("options", [{}, {"dispatch_batches": True}, {"split_batches": True}], ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_without_even_batches_ranks_end_when_they_have_no_more(size, options, kind):
    if options.get("split_batches"):
        if size == 3:
            return
        options = options | {"dispatch_batches": kind == "iterable"}
    for samples in (0, 1, 5, 8, 9):
        ranks = run(size, uneven, kind, samples, options)
        assert max(ranks, key=lambda r: r[1])[0] == list(range(samples))
        assert ranks[0][0] == list(range(samples))


# --- dispatching -------------------------------------------------------------------------------
Point = namedtuple("Point", "x y")


@dataclass
class Record:
    ids: torch.Tensor
    name: str


class Holder:
    """A batch class of the user's own, as tokenizers have them."""

    def __init__(self, ids):
        self.ids = ids

    def to(self, device):
        return Holder(self.ids.to(device))


class Ragged(IterableDataset):
    """Sequences of growing length: no two batches can be concatenated."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter([torch.full((i + 1,), i) for i in range(self.n)])


def pad(samples):
    ids = torch.tensor([int(s[0]) for s in samples])
    return {
        "ids": ids, "text": torch.nn.utils.rnn.pad_sequence(samples, batch_first=True),
        "names": [str(int(i)) for i in ids], "point": Point(ids * 2, (ids.bfloat16(), None)),
        "record": Record(ids + 1, "r"), "empty": torch.zeros(0, 3), "own": Holder(ids),
        "view": torch.stack([ids, ids]).T[:, 0], "yes": ids > 3, "number": 4,
    }  # fmt: skip


def variable(samples, even):
    from shardwise.comm import World

    loader = prepared(DataLoader(Ragged(samples), batch_size=2, collate_fn=pad), even_batches=even)
    assert type(loader) is DataLoaderDispatcher
    seen = []
    before = World.current().stats.of("dispatch").bytes_sent
    sent = 0
    for batch in loader:
        ids = batch["ids"]
        assert batch["text"].shape[0] == len(ids) and batch["text"].shape[1] == max(ids) + 1
        assert batch["names"] == [str(int(i)) for i in ids]
        assert torch.equal(batch["point"].x, ids * 2) and batch["point"].y[0].dtype == torch.bfloat16
        assert type(batch["record"]) is Record and type(batch["own"]) is Holder
        assert batch["number"] == 4 and batch["empty"].shape == (0, 3) and batch["yes"].dtype == torch.bool
        assert torch.equal(batch["record"].ids, ids + 1)
        if len(ids) == len(batch["own"].ids):  # what rank 0 filled up; it does not look into classes of one's own
            assert torch.equal(batch["own"].ids, ids)
        seen += gather_for_metrics(ids, loader.tail()).tolist()
        sent += 1
    return seen, sent, World.current().stats.of("dispatch").bytes_sent - before


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_variable_shapes_and_any_nesting(size, even):
    for samples in (8, 9):
        ranks = everywhere(size, variable, samples, even)
        assert ranks[0][0] == list(range(samples))
        if even:
            assert all(r[0] == list(range(samples)) for r in ranks)


def bytes_sent(rows):
    from shardwise.comm import World

    loader = prepared(DataLoader(torch.zeros(12, rows), batch_size=2), dispatch_batches=True)
    before = World.current().stats.of("dispatch").bytes_sent
    assert sum(1 for _ in loader) == 2
    return World.current().stats.of("dispatch").bytes_sent - before


def test_each_rank_is_sent_its_own_batch_only():
    sent = run(3, bytes_sent, 10_000)
    assert sent[1:] == [0, 0]
    payload = 2 * 2 * 2 * 10_000 * 4  # two rounds, two other ranks, a batch each
    assert payload <= sent[0] < payload + 4000


class Failing(IterableDataset):
    def __init__(self, at, what):
        self.at, self.what = at, what

    def __iter__(self):
        for i in range(100):
            if i == self.at:
                raise ValueError("the disk is gone")
            yield torch.tensor(i)


def lambdas(samples):
    return {"x": torch.stack(samples), "f": lambda: 0}


def failing(what):
    loader = DataLoader(Failing(11 if what == "dataset" else 1000, what), batch_size=2)
    if what == "unpicklable":
        loader.collate_fn = lambdas
    loader = prepared(loader)
    n = 0
    try:
        for _ in loader:
            n += 1
    except (ValueError, AttributeError) as error:
        kind, text = type(error).__name__, str(error)
    after = prepared(DataLoader(Stream(2 * world()), batch_size=2))
    assert [x.tolist() for x in after] == [[2 * rank(), 2 * rank() + 1]]
    return n, kind, text


def test_what_fails_on_rank_0_ends_all():
    first, *others = run(2, failing, "dataset")
    assert first == (1, "ValueError", "the disk is gone")
    assert all(n == 1 and kind == "DataError" and "the disk is gone" in text for n, kind, text in others)
    first, *others = run(3, failing, "unpicklable")
    assert first[1] == "DataError" and "cannot be sent" in first[2]
    assert all(kind == "DataError" and "cannot be sent" in text for _, kind, text in others)


def leaving():
    """A loop that is left early, on one rank earlier than on the others, and a second one."""
    loader = prepared(DataLoader(Stream(40), batch_size=2))
    for i, _ in enumerate(loader):
        if i == (1 if rank() else 2):
            break
    return [x.tolist() for x in loader]


def test_a_loop_left_early_does_not_disturb_the_next():
    first, second = run(2, leaving)
    assert sorted(v for batch in first + second for v in batch) == list(range(40))


def cutting(samples, own):
    calls = []

    def slice_fn(batch, part, process_index, num_processes):
        calls.append((part.start, part.stop, process_index, num_processes))
        return {"x": batch["x"][part], "all": len(batch["x"])}

    data = [{"x": i, "s": f"s{i}"} for i in range(samples)]
    loader = DataLoader(data, batch_size=4)
    loader = prepared(
        loader, split_batches=True, dispatch_batches=True, slice_fn_for_dispatch=slice_fn if own else None
    )
    return [{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in loader], calls


def test_split_batches_cuts_tensors_and_lists_or_lets_the_user_cut():
    ranks = run(2, cutting, 7, False)
    assert ranks[0][0] == [{"x": [0, 1], "s": ["s0", "s1"]}, {"x": [4, 5], "s": ["s4", "s5"]}]
    assert ranks[1][0] == [{"x": [2, 3], "s": ["s2", "s3"]}, {"x": [6, 4], "s": ["s6", "s4"]}]
    ranks = run(2, cutting, 4, True)
    assert [r[0] for r in ranks] == [[{"x": [0, 1], "all": 4}], [{"x": [2, 3], "all": 4}]]
    assert ranks[0][1] == [(0, 2, 0, 2), (2, 4, 1, 2)] and not ranks[1][1]


# --- kinds of loaders --------------------------------------------------------------------------
class Doubling(DataLoader):
    factor = 2

    def __iter__(self):
        for batch in super().__iter__():
            yield batch * self.factor


class Own(DataLoader):
    def __iter__(self):
        return iter([torch.tensor([i]) for i in range(4)])


def own_iter():
    loader = Doubling(torch.arange(8), batch_size=2)
    loader.factor = 3
    shard = prepared(loader)
    found = [x.tolist() for x in shard], shard.factor, len(shard), shard.batch_size
    with pytest.raises(DataError, match="does not read its sampler"):
        list(prepared(Own(torch.arange(4))))
    own = [x.tolist() for x in prepared(Own(torch.arange(4)), dispatch_batches=True)]
    return found, own


def test_subclasses_keep_their_iter():
    ranks = run(2, own_iter)
    assert ranks[0] == (([[0, 3], [12, 15]], 3, 2, 2), [[0], [2]])
    assert ranks[1] == (([[6, 9], [18, 21]], 3, 2, 2), [[1], [3]])


class ByList(Dataset):
    """A dataset that is asked for a whole batch at once, as Hugging Face's can be."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor(index) * 10


class Reversed(Sampler):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __iter__(self):
        return iter(range(self.n - 1, -1, -1))


class Global(Sampler):
    """Shuffles with the global random states, as people do."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __iter__(self):
        left = list(range(self.n))
        random.shuffle(left)
        np.random.shuffle(left)
        while left:
            yield left.pop(int(torch.randint(len(left), ())))


def kinds():
    torch.manual_seed(rank()), random.seed(rank()), np.random.seed(rank())
    out = {}
    x = torch.arange(10)
    out["items"] = [int(v) for v in prepared(DataLoader(x, batch_size=None))]
    whole = DataLoader(ByList(), batch_size=None, sampler=BatchSampler(range(10), 4, False))
    out["by list"] = [v.tolist() for v in prepared(whole)]
    out["batch sampler"] = [
        v.tolist() for v in prepared(DataLoader(x, batch_sampler=BatchSampler(Reversed(10), 3, True)))
    ]
    out["sampler"] = [v.tolist() for v in prepared(DataLoader(x, batch_size=5, sampler=Reversed(10)))]
    for name, sampler in (("global", Global(10)), ("replacement", RandomSampler(x, replacement=True))):
        loader = prepared(DataLoader(x, batch_size=5, sampler=sampler))
        out[name] = [[gather_for_metrics(v, loader.tail()).tolist() for v in loader] for _ in range(2)]
    split = DistributedSampler(x, world(), rank(), shuffle=False)
    out["distributed"] = [v.tolist() for v in prepared(DataLoader(x, batch_size=5, sampler=split))]
    with pytest.raises(DataError, match="DistributedSampler"):
        prepared(DataLoader(x, sampler=split), dispatch_batches=True)
    stream = iter(range(9))

    class OneShot(IterableDataset):
        def __iter__(self):
            return stream

    loader = prepared(DataLoader(OneShot(), batch_size=2))
    out["one shot"] = [gather_for_metrics(v, loader.tail()).tolist() for v in loader], list(loader)
    out["items of a stream"] = [int(v) for v in prepared(DataLoader(Stream(5), batch_size=None))]
    return out


def test_kinds_of_loaders():
    ranks = run(2, kinds)
    for r, out in enumerate(ranks):
        assert out["items"] == list(range(r, 10, 2))
        assert out["by list"] == [[[0, 10, 20, 30], [80, 90, 0, 10]], [[40, 50, 60, 70], [20, 30, 40, 50]]][r]
        assert out["batch sampler"] == [[[9, 8, 7]], [[6, 5, 4]]][r]
        assert out["sampler"] == [[[9, 8, 7, 6, 5]], [[4, 3, 2, 1, 0]]][r]
        assert out["distributed"] == [list(range(r, 10, 2))]
        assert out["one shot"] == ([[0, 1, 2, 3], [4, 5, 6, 7], [8]], [])
        assert out["items of a stream"] == [[0, 2, 4], [1, 3, 4]][r]
    for name in ("global", "replacement"):
        one, two = ranks[0][name]
        assert ranks[0][name] == ranks[1][name] and one != two
        assert name == "replacement" or sorted(one[0]) == sorted(two[0]) == list(range(10))


def test_one_process_reads_what_the_plain_loader_reads():
    for options in ({}, {"dispatch_batches": True}, {"split_batches": True}):
        for data in (torch.arange(7), Stream(7)):
            for drop_last in (False, True):
                plain = DataLoader(data, batch_size=3, drop_last=drop_last)
                loader = prepared(plain, **options)
                assert [x.tolist() for x in loader] == [x.tolist() for x in plain]
                assert len(loader) == len(plain) and loader.total_batch_size == 3
                assert loader.dataset is data and loader.total_dataset_length == 7
                assert prepared(loader) is loader and loader.drop_last == drop_last


def test_attributes_and_pickling():
    data = TensorDataset(torch.arange(10.0))
    loader = prepared(DataLoader(data, batch_size=4, shuffle=True, num_workers=0, collate_fn=None), data_seed=3)
    assert isinstance(loader, DataLoader) and type(loader) is DataLoaderShard
    assert loader.batch_size == 4 and loader.num_workers == 0 and loader.dataset is data
    assert isinstance(get_sampler(loader), RandomSampler) and loader.get_sampler() is get_sampler(loader)
    assert isinstance(loader.batch_sampler, BatchSamplerShard)
    again = pickle.loads(pickle.dumps(loader))
    assert [x[0].tolist() for x in again] == [x[0].tolist() for x in loader]
    sampler = SeedableRandomSampler(data, data_seed=3)
    orders = [list(sampler), list(sampler)]
    sampler.set_epoch(0)
    assert list(sampler) == orders[0] != orders[1]
    loader.set_epoch(0)
    assert [int(v) for x in loader for v in x[0]] == orders[0]
    mine = prepared(DataLoader(data, batch_size=10, sampler=SeedableRandomSampler(data, data_seed=3)))
    assert [[int(v) for v in x[0]] for x in (*mine, *mine)] == orders
    with pytest.raises(DataError, match="list is not a torch DataLoader"):
        prepared([1, 2])
    with pytest.raises(AttributeError):
        loader.nothing_of_this_name  # noqa: B018
    with pytest.raises(DataError, match="over 2 ranks, where 1 run"):
        prepared(DataLoader(data), dispatch_batches=True, num_processes=2, process_index=0)


def test_the_training_draws_nothing_less_or_more_because_of_the_data():
    loader = prepared(DataLoader(Stream(12, shuffled=True), batch_size=4), dispatch_batches=False)
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    wanted = [torch.rand(3).tolist(), random.random(), np.random.rand()]
    torch.manual_seed(5), random.seed(5), np.random.seed(5)
    for _ in loader:
        pass
    assert [torch.rand(3).tolist(), random.random(), np.random.rand()] == wanted


class Remembering:
    """A watcher."""

    def __init__(self):
        self.seen = []

    def loader_begins(self, loader):
        self.seen.append("begins")

    def loader_ends(self, loader):
        self.seen.append("ends")

    def batch_comes(self, loader, exists):
        self.seen.append((exists, loader.end_of_dataloader))


def test_a_watcher_hears_of_every_batch_before_it_is_handed_out():
    watcher = Remembering()
    loader = prepared(DataLoader(torch.arange(4), batch_size=2), watcher=watcher)
    seen = [list(watcher.seen) for _ in loader]
    assert seen == [["begins", (True, False)], ["begins", (True, False), (True, True)]]
    assert watcher.seen[3:] == [(False, True), "ends"]
    for _ in loader:
        break
    assert watcher.seen[5:] == ["begins", (True, False), "ends"]


def telling_epochs(workers, persistent):
    class Told(Stream):
        epoch = -1

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([self.epoch] * 4)

    loader = DataLoader(Told(4), batch_size=2, num_workers=workers, persistent_workers=persistent)
    loader = prepared(loader, dispatch_batches=False)
    seen = [[x.tolist() for x in loader] for _ in range(2)]
    loader.set_epoch(7)
    return [*seen, [x.tolist() for x in loader]]


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (1, True)])
def test_iterable_datasets_hear_of_the_epoch_also_in_workers_that_stay(workers, persistent):
    n = max(workers, 1)
    assert telling_epochs(workers, persistent) == [[[e, e]] * 2 * n for e in (0, 1, 7)]


# --- the middle of an epoch --------------------------------------------------------------------
RESUMES = {
    "map-style": {},
    "map-style, split": {"split_batches": True},
    "map-style, dispatched": {"dispatch_batches": True},
    "map-style, dispatched, split": {"dispatch_batches": True, "split_batches": True},
    "map-style, 2 workers": {"workers": 2},
    "map-style, persistent workers": {"workers": 1, "persistent_workers": True},
    "map-style, custom sampler": {"sampler": Global},
    "map-style, uneven": {"even_batches": False},
    "iterable": {"dispatch_batches": False},
    "iterable, split": {"dispatch_batches": False, "split_batches": True},
    "iterable, dispatched": {},
    "iterable, dispatched, split": {"split_batches": True},
    "iterable, 2 workers": {"dispatch_batches": False, "workers": 2},
    "iterable, dispatched, 2 workers": {"workers": 2},
}  # fmt: skip
for _name in list(RESUMES):
    if "iterable" in _name or _name == "map-style":
        RESUMES[_name + ", stateful"] = RESUMES[_name] | {"use_stateful_dataloader": True}


def fresh(mode, shuffled, seed):
    """New objects, under other random states than any before."""
    torch.manual_seed(seed + rank()), random.seed(seed + rank()), np.random.seed(seed + rank())
    options = dict(RESUMES[mode])
    given = {"batch_size": 2, "num_workers": options.pop("workers", 0)}
    if options.pop("persistent_workers", False):
        given["persistent_workers"] = True
    size = given["batch_size"] = 2 * world() if options.get("split_batches") else 2
    samples = 4 * world() * 2 + 1
    sampler = options.pop("sampler", None)
    if mode.startswith("iterable"):
        loader = DataLoader(Stream(samples, shuffled), **given)
    elif sampler is not None:
        loader = DataLoader(torch.arange(samples), sampler=sampler(samples), **given)
    else:
        loader = DataLoader(torch.arange(samples), shuffle=shuffled, **given)
    assert size
    return prepared(loader, **options)


def noise():
    """What a training does to the global random states."""
    torch.rand(3), random.random(), np.random.rand()


def interrupted(mode, shuffled, by_epoch, at, begin=0, end=3):
    """Three epochs as they are, and as they are if the run ends after ``at`` batches of the second."""
    allow_workers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        def epochs(loader, first, stop=None):
            for epoch in range(first, end):
                if by_epoch:
                    loader.set_epoch(epoch)
                seen = out[epoch]
                for i, x in enumerate(loader):
                    seen.append((x.tolist(), loader.end_of_dataloader, loader.tail()))
                    noise()
                    if stop is not None and epoch == 1 and i + 1 == stop:
                        return

        out = whole = [[], [], []]
        loader = fresh(mode, shuffled, 0)
        epochs(loader, begin)
        kept = loader.state_dict()["seed"]
        out = parts = [[], [], []]
        first = fresh(mode, shuffled, 0)
        assert first.state_dict()["seed"] == kept
        if at:
            epochs(first, begin, at)
        else:  # between two epochs
            list(first)
        state = first.state_dict()
        state = json.loads(json.dumps(state)) if "stateful" not in state else pickle.loads(pickle.dumps(state))
        del first
        second = fresh(mode, shuffled, 99)
        second.load_state_dict(state)
        assert second.state_dict() == state
        finished = at == len(whole[1])
        epochs(second, 2 if finished else 1)
        if not at:
            parts[0] = whole[0]
        return whole, parts


def check_resumed(pair, shuffled, end=3):
    whole, parts = pair
    assert parts == whole and whole[1]
    order = [[v for batch, _, _ in epoch for v in batch] for epoch in whole]
    assert not shuffled or end < 3 or order[1] != order[2]
    assert not shuffled or order[1] != sorted(order[1])


# Every mode on two ranks, and on one or three in turn; the rest of the product is slow.
RESUMED_ON = [
    pytest.param(size, mode, marks=[] if size == 2 or size == (1, 3)[k % 2] else pytest.mark.slow)
    for k, mode in enumerate(m for m in RESUMES if "workers" not in m)
    for size in (1, 2, 3)
]


@pytest.mark.parametrize("same", [False, slow(True)])
@pytest.mark.parametrize(("size", "mode"), RESUMED_ON)
def test_resumes_in_the_exact_remaining_order(size, mode, same):
    if "stateful" in mode and not STATEFUL:
        pytest.skip("needs torchdata")
    for shuffled in (False, True):
        by_epoch = shuffled == same  # with set_epoch, or without
        for at in (1, 4) if "uneven" in mode else (0, 3, 5):  # 5 is the last
            for pair in everywhere(size, interrupted, mode, shuffled, by_epoch, at):
                check_resumed(pair, shuffled or "custom" in mode)


@pytest.mark.parametrize(
    "mode",
    [
        m if m == "iterable, dispatched, 2 workers" else pytest.param(m, marks=pytest.mark.slow)
        for m in RESUMES
        if "workers" in m
    ],
)
def test_resumes_in_the_exact_remaining_order_with_workers(mode):
    if "stateful" in mode and not STATEFUL:
        pytest.skip("needs torchdata")
    for pair in run(2, interrupted, mode, True, True, 2, 1, 2):
        check_resumed(pair, True, 2)


class Counting(Dataset):
    def __init__(self, n):
        self.n, self.asked = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.asked.append(index)
        return index


def test_map_style_data_is_not_read_to_be_skipped():
    data = Counting(20)
    loader = prepared(DataLoader(data, batch_size=2))
    loader.load_state_dict({"epoch": 0, "batches": 8, "batch_size": 2, "seed": 0})
    assert [x.tolist() for x in loader] == [[16, 17], [18, 19]]
    assert data.asked == [16, 17, 18, 19]


def half(shuffled, dispatched, state, iterable):
    data = Stream(24) if iterable else torch.arange(24)
    loader = prepared(DataLoader(data, batch_size=2, shuffle=shuffled or None), dispatch_batches=dispatched)
    seen = []
    if state is not None:
        loader.load_state_dict(state)
    for i, x in enumerate(loader):
        seen += gather_for_metrics(x, loader.tail()).tolist()
        if state is None and i == 1:
            break
    return seen, loader.state_dict()


@pytest.mark.parametrize("kind", ["map-style", "map-style, dispatched", "iterable", "iterable, dispatched"])
def test_a_position_of_two_ranks_is_one_of_three_ranks_or_one(kind):
    iterable, dispatched = "iterable" in kind, "dispatched" in kind
    (seen, state), _ = run(2, half, not iterable, dispatched, None, iterable)
    assert len(seen) == 8 and state["batches"] == 4
    for size in (1, 3):
        for rest, _ in everywhere(size, half, not iterable, dispatched, state, iterable):
            assert sorted(seen + rest) == list(range(24))


def test_a_position_with_another_batch_size_goes_on_at_a_batch_border():
    loader = prepared(DataLoader(torch.arange(24), batch_size=2))
    iterator = iter(loader)
    for _ in range(5):
        next(iterator)
    state = loader.state_dict()
    assert state["batches"] == 5
    other = prepared(DataLoader(torch.arange(24), batch_size=4))
    other.load_state_dict(state)
    assert next(iter(other)).tolist() == [8, 9, 10, 11]  # 10 samples were seen: batch 2 of 4 begins at 8


def test_set_epoch_keeps_or_drops_a_loaded_position():
    def loaded():
        loader = prepared(DataLoader(torch.arange(6), batch_size=2))
        loader.load_state_dict({"epoch": 3, "batches": 2, "batch_size": 2, "seed": 0})
        return loader

    assert [x.tolist() for x in loaded()] == [[4, 5]]
    for epoch, batches in ((3, 1), (4, 3)):
        loader = loaded()
        loader.set_epoch(epoch)
        assert [len(list(loader)), len(list(loader))] == [batches, 3]
        assert loader.state_dict()["epoch"] == epoch + 2
    with pytest.raises(DataError, match="'batches' is missing"):
        loader.load_state_dict({"epoch": 1})


# --- skip_first_batches ------------------------------------------------------------------------
def skipping(mode):
    first = fresh(mode, True, 0)
    whole = [[x.tolist() for x in first] for _ in range(3)]
    loader = fresh(mode, True, 0)
    view = skip_first_batches(loader, 2)
    assert isinstance(view, SkipDataLoader) and len(view) == len(loader) - 2
    assert view.batch_size == loader.batch_size
    parts = [[x.tolist() for x in view], [x.tolist() for x in loader]]
    assert view.end_of_dataloader
    iterator = iter(loader)  # the third epoch
    next(iterator)
    state = loader.state_dict()
    again = fresh(mode, True, 5)
    again.load_state_dict(state)
    rest = [x.tolist() for x in skip_first_batches(skip_first_batches(again, 1), 1)]
    return parts == [whole[0][2:], whole[1]] and rest == whole[2][2:] and len(list(again)) == len(whole[0])


@pytest.mark.parametrize("mode", ["map-style", "map-style, dispatched", "iterable", "iterable, dispatched"])
@pytest.mark.parametrize("size", [1, 2])
def test_skip_first_batches_reads_the_rest_of_the_epoch_in_progress(size, mode):
    assert everywhere(size, skipping, mode) == [True] * size


def test_skip_first_batches_of_plain_loaders():
    data = Counting(10)
    rest = skip_first_batches(DataLoader(data, batch_size=3), 2)
    assert [x.tolist() for x in rest] == [x.tolist() for x in rest] == [[6, 7, 8], [9]]
    assert data.asked == [6, 7, 8, 9] * 2 and len(rest) == 2
    assert [x.tolist() for x in skip_first_batches(rest, 1)] == [[9]]
    assert [x.tolist() for x in prepared(rest)] == [[6, 7, 8], [9]]
    stream = skip_first_batches(DataLoader(Stream(5), batch_size=2), 1)
    assert [x.tolist() for x in stream] == [[2, 3], [4]] and len(stream) == 2
    ready = prepared(stream)
    assert [x.tolist() for x in ready] == [x.tolist() for x in ready] == [[2, 3], [4]]
    whole = DataLoader(ByList(), batch_size=None, sampler=BatchSampler(range(10), 4, False))
    assert [x.tolist() for x in skip_first_batches(whole, 2)] == [[80, 90]]
    with pytest.raises(DataError, match="cannot be skipped"):
        skip_first_batches(stream, -1)


# --- torchdata ---------------------------------------------------------------------------------
class Positioned(IterableDataset):
    """A dataset that knows where it is."""

    def __init__(self, n):
        self.n, self.at, self.read = n, 0, []

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < self.n:
            self.at += 1
            self.read.append(self.at - 1)
            yield torch.tensor(self.at - 1)
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def positioned(dispatched):
    def make():
        data = Positioned(17)
        loader = DataLoader(data, batch_size=2)
        return data, prepared(loader, use_stateful_dataloader=True, dispatch_batches=dispatched)

    _, loader = make()
    seen = []
    for x in loader:
        seen += gather_for_metrics(x, loader.tail()).tolist()
        if len(seen) == 8:
            break
    state = loader.state_dict()
    data, loader = make()
    loader.load_state_dict(state)
    for x in loader:
        seen += gather_for_metrics(x, loader.tail()).tolist()
    return seen, data.read


@needs_torchdata
@pytest.mark.parametrize("dispatched", [False, True])
def test_a_stateful_dataset_is_not_read_again(dispatched):
    for r, (seen, read) in enumerate(run(2, positioned, dispatched)):
        assert seen == list(range(17))
        assert read == ([] if dispatched and r else list(range(8, 17)))


def test_stateful_loaders_need_torchdata(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torchdata.stateful_dataloader", None)
    with pytest.raises(MissingPackage, match="pip install"):
        prepared(DataLoader(torch.arange(4)), use_stateful_dataloader=True)
