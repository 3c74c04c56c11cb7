"""How much memory there is, and what a run takes of it beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from shardwise import device as devices
from shardwise import host
from shardwise.errors import OffloadError
from shardwise.inference.plan import HOST, Room, WeightsPlan
from shardwise.sizes import format_bytes, parse_bytes

KEPT = 0.9
"""The part of what is free that weights and activations may take: allocators round up, and others run, too."""


def room_for(
    device: torch.device, max_memory: Mapping[int | str, int | str] | None, beside: int, ranks: int = 1
) -> Room:
    """What may be used.

    Args:
        device: where the model runs.
        max_memory: bytes, or ``"10GiB"``, by number of the device and ``"cpu"``; default: :data:`KEPT` of what is free.
        beside: bytes that are not for weights.
        ranks: of this host, which share what is free. What is given is each one's own.

    Raises:
        OffloadError: a size that is none, or of a device that the model does not run on.
    """
    given = {str(key): _bytes(key, value) for key, value in (max_memory or {}).items()}
    memory = given.get("cpu")
    if memory is None:
        free = host.memory()
        if free is None:
            raise OffloadError("this system does not say how much memory is free", fix="max_memory={'cpu': '8GiB'}")
        memory = int(KEPT * free.free) // ranks
    known = {"cpu", str(device.index or 0), str(device)}
    if unknown := sorted(given.keys() - known):
        raise OffloadError(f"max_memory is about {', '.join(unknown)}", fix=f"the model runs on {device}, and 'cpu'")
    if device.type == "cpu":
        return Room(memory, 0, beside)
    here = given.get(str(device.index or 0), given.get(str(device)))
    if here is None:
        told = devices.memory(device)
        if told is None:
            raise OffloadError(f"{device} does not say how much memory is free", fix="max_memory={0: '8GiB'}")
        here = int(KEPT * told[0])
    return Room(here, memory, beside)


def _bytes(key: object, value: int | str) -> int:
    found = parse_bytes(value)
    if found is None:
        raise OffloadError(f"max_memory[{key!r}]={value!r} is no size", fix="bytes, or '10GiB', '500MB'")
    return found


def require_room(plan: WeightsPlan, room: Room) -> None:
    """Raise if a plan that somebody has made does not fit.

    Raises:
        OffloadError: says how much is missing, and where.
    """
    for what, needed, there in (("device", plan.device, room.device), ("host", plan.total(HOST), room.host)):
        if needed > there:
            raise OffloadError(
                f"this map takes {format_bytes(needed)} of the {what}, and {format_bytes(there)} are allowed",
                fix="put more on 'disk', or let device_map='auto' choose",
            )


def memory_beside(module: nn.Module, *, batch: int, length: int) -> int:
    """Bytes that a forward takes beside the weights: activations, logits, and the cache of keys and values.

    Args:
        module: of transformers as a rule: its ``config`` says how wide it is.
        batch, length: sequences at a time, and tokens of each.

    An estimate from above for decoders. Of a module without ``config`` only its buffers are counted.
    """
    if batch < 1 or length < 1:
        raise OffloadError(f"batch={batch}, length={length}", fix="give positive numbers")
    buffers = sum(b.nbytes for b in module.buffers())
    config: Any = getattr(module, "config", None)
    config = getattr(config, "text_config", None) or config
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        return buffers
    heads = getattr(config, "num_attention_heads", 1) or 1
    keys = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or width // heads
    layers = getattr(config, "num_hidden_layers", 1)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    vocabulary = getattr(config, "vocab_size", 0)
    itemsize = next((p.dtype.itemsize for p in module.parameters()), 4)
    cache = 2 * layers * batch * length * keys * head * itemsize
    activations = batch * length * (8 * width + 3 * inner) * itemsize
    logits = batch * vocabulary * (itemsize + 4)
    return buffers + cache + activations + logits
