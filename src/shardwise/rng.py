"""Seeds, and generators that agree over the ranks."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from shardwise import device, operations
from shardwise.errors import ConfigError


def set_seed(seed: int, device_specific: bool = False, deterministic: bool = False) -> None:
    """Seed ``random``, ``numpy`` and ``torch`` on all devices.

    Args:
        seed: from 0 to 2**32 - 1.
        device_specific: add the rank, so that each rank draws other numbers.
        deterministic: make torch refuse operations that are not deterministic.

    Raises:
        ConfigError: not such a number.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed!r} is not a number from 0 to 2**32 - 1", where="set_seed", fix="give one")
    seed = (int(seed) + (operations.rank_and_size()[0] if device_specific else 0)) % 2**32
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)  # all devices
    if deterministic:
        torch.use_deterministic_algorithms(True)


def synchronize_rng_state(rng_type: enum.Enum | str | None = None, generator: torch.Generator | None = None) -> None:
    """Give every rank the state of rank 0's generator. A collective.

    Args:
        rng_type: ``torch`` (the CPU's default generator), a type of accelerator such as ``cuda`` (that of the current
            device) or ``generator``; ``None`` means ``generator`` if one is given and ``torch`` otherwise.
        generator: for ``generator``.

    Raises:
        ConfigError: another type, ``generator`` without one, or a type of which there is no device.
    """
    kind = _kind(rng_type if rng_type is not None else "torch" if generator is None else "generator")
    if kind == "generator":
        if generator is None:
            raise ConfigError("no generator is given", where="synchronize_rng_state", fix="pass generator=")
        generator.set_state(operations.broadcast(generator.get_state()))
    elif kind == "torch":
        torch.set_rng_state(operations.broadcast(torch.get_rng_state()))
    else:
        if device.accelerator() != kind:
            raise ConfigError(f"there is no {kind} device", where="synchronize_rng_state", fix=f"leave {kind!r} out")
        device.set_rng_state(kind, operations.broadcast(device.get_rng_state(kind)))


def synchronize_rng_states(rng_types: Iterable[enum.Enum | str], generator: torch.Generator | None = None) -> None:
    """:func:`synchronize_rng_state` for each type."""
    for kind in [_kind(rng_type) for rng_type in rng_types]:
        synchronize_rng_state(kind, generator)


def _kind(rng_type: Any) -> str:
    """Its name, from that or from a member of ``RNGType``, ours or Accelerate's."""
    value = getattr(rng_type, "value", rng_type)
    if value not in ("torch", "generator", *device.KINDS, device.accelerator()):
        raise ConfigError(f"rng_type={value!r} is not served", fix="torch, generator, or a device type such as cuda")
    return str(value)
