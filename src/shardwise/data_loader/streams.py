"""Random states that belong to the data alone, and the order of an epoch that follows from them.

What decides an order is one seed, equal on all ranks, and the epoch's number. Nothing of the training's own random
state flows in, and none is used up: that is why orders are equal everywhere, and can be begun again in the middle.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from shardwise.data_loader.epochs import EpochDataset
from shardwise.data_loader.overlay import overlay
from shardwise.data_loader.sampling import BatchSamplerShard, SkipBatchSampler

_LIMIT = 1 << 63
# numpy's own stubs do not name these two.
_get_bit_generator: Any = vars(np.random)["get_bit_generator"]
_set_bit_generator: Any = vars(np.random)["set_bit_generator"]


def mixed(*numbers: int) -> int:
    """One number below 2**63 out of several, the same in every process."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _LIMIT


class RandomStream:
    """A random state of its own for ``random``, ``numpy.random`` and torch (CPU): the global one inside ``with``.

    Cost: about 30 microseconds each time it is entered and left.
    """

    def __init__(self, *numbers: int) -> None:
        self.seed(*numbers)

    def seed(self, *numbers: int) -> None:
        """Begin the stream that belongs to ``numbers``."""
        value = mixed(*numbers)
        self._python: Any = random.Random(value).getstate()
        self._numpy: Any = np.random.MT19937(value)
        self._torch = torch.Generator().manual_seed(value).get_state()

    def __enter__(self) -> RandomStream:
        self._outer = random.getstate(), _get_bit_generator(), torch.get_rng_state()
        random.setstate(self._python)
        _set_bit_generator(self._numpy)
        torch.set_rng_state(self._torch)
        return self

    def __exit__(self, *_: object) -> None:
        self._python, self._torch = random.getstate(), torch.get_rng_state()
        random.setstate(self._outer[0])
        _set_bit_generator(self._outer[1])
        torch.set_rng_state(self._outer[2])

    def iterate(self, items: Any) -> Iterator[Any]:
        """``iter(items)``, with all that it draws taken from this stream."""
        missing = object()
        with self:
            source = iter(items)
        while True:
            with self:
                item = next(source, missing)
            if item is missing:
                return
            yield item

    def state_dict(self) -> dict[str, Any]:
        numbers = self._numpy.state["state"]
        return {
            "python": [self._python[0], list(self._python[1]), self._python[2]],
            "numpy": {"key": [int(k) for k in numbers["key"]], "pos": int(numbers["pos"])},
            "torch": self._torch.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        version, numbers, gauss = state["python"]
        self._python = version, tuple(numbers), gauss
        key = np.array(state["numpy"]["key"], dtype=np.uint32)
        self._numpy.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": state["numpy"]["pos"]}}
        self._torch = torch.tensor(state["torch"], dtype=torch.uint8)


class SeedableRandomSampler(RandomSampler):
    """A ``RandomSampler`` whose order follows from a seed and an epoch, each iteration being the next epoch.

    Args:
        args, kwargs: those of ``RandomSampler``.
        data_seed: the seed; by default torch's initial seed.
    """

    def __init__(self, *args: Any, data_seed: int | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.initial_seed = torch.random.initial_seed() if data_seed is None else data_seed
        self.epoch = 0

    def __iter__(self) -> Iterator[int]:
        if self.generator is None:
            self.generator = torch.Generator()
        self.generator.manual_seed((self.initial_seed + self.epoch) % _LIMIT)
        yield from super().__iter__()
        self.epoch += 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch


_DRAWS_FROM_ITS_GENERATOR = (
    BatchSampler, DistributedSampler, RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler,
    SeedableRandomSampler, BatchSamplerShard, SkipBatchSampler,
)  # fmt: skip
_INNER = ("batch_sampler", "sampler")


class Order:
    """The orders of a loader's epochs: samplers to read through, and all that must be seeded before an epoch.

    Samplers that hold a ``torch.Generator`` are copied, and the copies hold a generator of ours; the originals are
    not touched. A class that torch does not bring is read through an :func:`~shardwise.data_loader.overlay.overlay`,
    so that the script's own object stays in charge; it may draw from global random states too, so it is read inside a
    :class:`RandomStream`.

    Args:
        dataset: told the epoch, if it has a ``set_epoch``.
        rank: workers of different ranks draw different numbers.
        seedable: show a ``RandomSampler`` as a :class:`SeedableRandomSampler`, whose order is the same.
    """

    def __init__(self, dataset: Any, rank: int, seedable: bool = False) -> None:
        self.dataset, self.rank, self.seedable = dataset, rank, seedable
        self.seed = 0
        self.shuffler = torch.Generator()
        self.workers = torch.Generator()  # what a DataLoader draws its workers' seeds from
        self.stream: RandomStream | None = None
        self.parts: list[Any] = [dataset]
        self.originals: list[Any] = []  # of what is copied: a script may ask its own sampler for the epoch
        self.in_workers: EpochDataset | None = None  # the dataset, as workers that stay see it
        self._found: torch.Generator | None = None
        self._initial_seed: int | None = None
        held = getattr(dataset, "generator", None)
        if isinstance(held, torch.Generator):
            self._found = held

    def follow(self, sampler: Any) -> Any:
        """The sampler (or batch sampler, of any depth) to read instead of ``sampler``; inside ``stream``, if any.

        The sampler itself if nothing in it draws from a ``torch.Generator``; else one of the same class.
        """
        return self._copied(sampler)

    def tell(self, part: Any) -> None:
        """Let ``part`` know the epoch too, wherever it is."""
        self.parts.append(part)

    def _copied(self, sampler: Any) -> Any:
        changed: dict[str, Any] = {}
        for name in _INNER:
            inner = getattr(sampler, name, None)
            if inner is not None and hasattr(inner, "__iter__") and name in getattr(sampler, "__dict__", {}):
                own = self._copied(inner)
                if own is not inner:
                    changed[name] = own
        for name, value in getattr(sampler, "__dict__", {}).items():
            if isinstance(value, torch.Generator) or (name == "generator" and value is None):
                self._found = self._found if value is None else value
                changed[name] = self.shuffler
        if hasattr(sampler, "initial_seed") and hasattr(sampler, "set_epoch"):
            self._initial_seed = int(sampler.initial_seed)
            changed["initial_seed"] = 0  # until the ranks have agreed on one
        known = type(sampler) in (*_DRAWS_FROM_ITS_GENERATOR, range, list, tuple)
        if not known:
            self.stream = self.stream or RandomStream(0)
        if changed and not known:
            sampler = overlay(sampler, changed)
        elif changed:
            self.originals.append(sampler)
            sampler = copy.copy(sampler)
            vars(sampler).update(changed)
            if self.seedable and type(sampler) is RandomSampler:
                sampler.__class__ = SeedableRandomSampler
                vars(sampler).update(initial_seed=0, epoch=0)
        self.parts.append(sampler)
        return sampler

    def draw(self) -> int:
        """A seed, from the generator that the loader was made with, or from torch's."""
        if self._initial_seed is not None:
            return self._initial_seed
        device = self._found.device if self._found is not None else "cpu"
        return int(torch.empty((), dtype=torch.int64, device=device).random_(generator=self._found))

    def set_seed(self, seed: int) -> None:
        self.seed = seed
        for part in self.parts:
            if "initial_seed" in getattr(part, "__dict__", {}):
                part.initial_seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Tell dataset and samplers."""
        told: set[int] = set()
        for part in (*self.parts, *self.originals):
            if id(part) not in told and callable(getattr(part, "set_epoch", None)):
                told.add(id(part))
                part.set_epoch(epoch)

    def begin(self, epoch: int, start: int) -> None:
        """Seed everything for an epoch that is read from batch ``start`` on."""
        self.set_epoch(epoch)
        if self.in_workers is not None:
            self.in_workers.begin(epoch)
        self.shuffler.manual_seed((self.seed + epoch) % _LIMIT)
        self.workers.manual_seed(mixed(self.seed, epoch, self.rank, start))
        if self.stream is not None:
            self.stream.seed(self.seed, epoch)
