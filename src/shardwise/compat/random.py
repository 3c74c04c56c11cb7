"""What scripts import from ``accelerate.utils.random``: see :mod:`shardwise.rng`."""

from shardwise.rng import set_seed, synchronize_rng_state, synchronize_rng_states

__all__ = ["set_seed", "synchronize_rng_state", "synchronize_rng_states"]
