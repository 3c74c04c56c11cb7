"""Random states by name, for code that draws some of its numbers alike on all ranks and others not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from shardwise.deepspeed.accelerator.real_accelerator import get_accelerator
from shardwise.errors import ConfigError
from shardwise.operations import rank_and_size

_DEFAULT = "model-parallel-rng"


class RngStates:
    """Random states of this process's device, by name."""

    def __init__(self) -> None:
        self.states_: dict[str, torch.Tensor] = {}
        self.seeds_: set[int] = set()

    def reset(self) -> None:
        """Forget all."""
        self.states_, self.seeds_ = {}, set()

    def get_states(self) -> dict[str, torch.Tensor]:
        """A copy of them."""
        return dict(self.states_)

    def set_states(self, states: dict[str, torch.Tensor]) -> None:
        """Replace them."""
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        """A new state, as ``seed`` gives it.

        Raises:
            ConfigError: the name or the seed is there already.
        """
        if seed in self.seeds_ or name in self.states_:
            what = f"seed {seed}" if seed in self.seeds_ else f"state '{name}'"
            raise ConfigError(f"{what} is there already", where="the tracker of random states", fix="reset() first")
        self.seeds_.add(seed)
        device = get_accelerator()
        before = device.get_rng_state()
        device.manual_seed(seed)
        self.states_[name] = device.get_rng_state()
        device.set_rng_state(before)

    @contextmanager
    def fork(self, name: str = _DEFAULT) -> Iterator[None]:
        """A block that draws from the state of that name, and leaves the others alone.

        Raises:
            ConfigError: there is none.
        """
        if name not in self.states_:
            raise ConfigError(f"there is no state '{name}'", where="the tracker of random states", fix="add() it first")
        device = get_accelerator()
        before = device.get_rng_state()
        device.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = device.get_rng_state()
            device.set_rng_state(before)


_states = RngStates()


def get_cuda_rng_tracker() -> RngStates:
    """The one of this process."""
    return _states


def model_parallel_cuda_manual_seed(seed: int) -> None:
    """Seed the default state alike on all ranks, and a second one by rank."""
    _states.reset()
    get_accelerator().manual_seed(seed)
    _states.add(_DEFAULT, seed + 2718 + rank_and_size()[0])
