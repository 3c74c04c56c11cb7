"""How much memory there is, and what a run takes of it beside the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from shardwise import device as devices
from shardwise import host
from shardwise.errors import OffloadError
from shardwise.quantization.linear import QuantizedLinear
from shardwise.sizes import parse_bytes

KEPT = 0.9
"""The part of what is free that weights and activations may take: allocators round up, and others run, too."""


def memory_of(
    places: Sequence[torch.device], max_memory: Mapping[int | str, int | str] | None, ranks: int = 1
) -> tuple[dict[torch.device, int], int]:
    """What may be used of each device, and of host memory beside it: 0 where that is the device's.

    Args:
        places: the devices that may be used. If ``max_memory`` names some of them, only these are.
        max_memory: bytes, or ``"10GiB"``, by number of the device and ``"cpu"``; default: :data:`KEPT` of what is free.
        ranks: of this host, which share what is free. What is given is each one's own.

    Raises:
        OffloadError: a size that is none, or of another device.
    """
    given = {str(key): _bytes(key, value) for key, value in (max_memory or {}).items()}
    memory = given.get("cpu")
    if memory is None:
        free = host.memory()
        if free is None:
            raise OffloadError("this system does not say how much memory is free", fix="max_memory={'cpu': '8GiB'}")
        memory = int(KEPT * free.free) // ranks
    words = {device: (str(device.index or 0), str(device)) for device in places}
    known = {"cpu", *(word for its in words.values() for word in its)}
    if unknown := sorted(given.keys() - known):
        where = ", ".join(map(str, places))
        raise OffloadError(f"max_memory is about {', '.join(unknown)}", fix=f"the model runs on {where}, and 'cpu'")
    if places[0].type == "cpu":
        return {places[0]: memory}, 0
    named = {device: given[word] for device in places for word in words[device] if word in given}
    if named:
        return {device: size for device, size in named.items() if size} or named, memory
    free_there = {}
    for device in places:
        told = devices.memory(device)
        if told is None:
            raise OffloadError(f"{device} does not say how much memory is free", fix="max_memory={0: '8GiB'}")
        free_there[device] = int(KEPT * told[0])
    return free_there, memory


def _bytes(key: object, value: int | str) -> int:
    found = parse_bytes(value)
    if found is None:
        raise OffloadError(f"max_memory[{key!r}]={value!r} is no size", fix="bytes, or '10GiB', '500MB'")
    return found


def memory_beside(module: nn.Module, *, batch: int, length: int) -> int:
    """Bytes that a forward takes beside the weights: the sum of :func:`activations_and_cache`."""
    return sum(activations_and_cache(module, batch=batch, length=length))


def activations_and_cache(module: nn.Module, *, batch: int, length: int) -> tuple[int, int]:
    """Bytes that a forward takes beside the weights.

    Args:
        module: of transformers as a rule: its ``config`` says how wide it is.
        batch, length: sequences at a time, and tokens of each.

    Returns:
        Of buffers, activations and logits, and of the cache of keys and values. An estimate from above for decoders. Of
        a module without ``config`` only its buffers are counted, and what a quantised layer computes with.
    """
    if batch < 1 or length < 1:
        raise OffloadError(f"batch={batch}, length={length}", fix="give positive numbers")
    buffers = sum(b.nbytes for b in module.buffers())
    itemsize = next((p.dtype.itemsize for p in module.parameters() if p.is_floating_point()), 4)
    buffers += max((m.bytes_beside(itemsize) for m in module.modules() if isinstance(m, QuantizedLinear)), default=0)
    config: Any = getattr(module, "config", None)
    config = getattr(config, "text_config", None) or config
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        return buffers, 0
    heads = getattr(config, "num_attention_heads", 1) or 1
    keys = getattr(config, "num_key_value_heads", None) or heads
    head = getattr(config, "head_dim", None) or width // heads
    layers = getattr(config, "num_hidden_layers", 1)
    inner = getattr(config, "intermediate_size", None) or 4 * width
    vocabulary = getattr(config, "vocab_size", 0)
    cache = 2 * layers * batch * length * keys * head * itemsize
    activations = batch * length * (8 * width + 3 * inner) * itemsize
    logits = batch * vocabulary * (itemsize + 4)
    return buffers + activations + logits, cache
