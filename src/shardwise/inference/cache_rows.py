"""The cache of keys and values of transformers, for some rows of a batch, and put together again.

Only what is known to have the batch along dim 0, and nothing else that depends on it, is taken apart: ``DynamicCache``
with layers that grow or slide, and an ``EncoderDecoderCache`` of two of them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import torch


def is_cache(item: Any) -> bool:
    """Is it a cache of transformers, of any kind?"""
    known = _transformers()
    return known is not None and isinstance(item, known.Cache)


def can_be_cut(cache: Any) -> bool:
    """May :func:`rows_of` take rows of it?"""
    known = _transformers()
    if known is None:
        return False
    if type(cache) is known.EncoderDecoderCache:
        return can_be_cut(cache.self_attention_cache) and can_be_cut(cache.cross_attention_cache)
    layers = (known.DynamicLayer, known.DynamicSlidingWindowLayer)
    return type(cache) is known.DynamicCache and not cache.offloading and all(type(x) in layers for x in cache.layers)


def rows_of(cache: Any, start: int, stop: int) -> Any:
    """A cache with rows ``start:stop`` of one, which sees nothing of it afterwards. Nothing is copied."""
    new = copy.copy(cache)
    if hasattr(cache, "self_attention_cache"):
        new.self_attention_cache = rows_of(cache.self_attention_cache, start, stop)
        new.cross_attention_cache = rows_of(cache.cross_attention_cache, start, stop)
        new.is_updated = dict(cache.is_updated)
        return new
    new.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in new.layers:
        if _filled(layer):
            layer.keys, layer.values = layer.keys[start:stop], layer.values[start:stop]
    return new


def put_together(parts: Sequence[Any], into: Any | None) -> Any:
    """The cache that all rows would have had.

    Args:
        parts: after a forward, in the order of the rows.
        into: the cache that they were rows of, which is changed; ``None``: there was none. The first part becomes it.

    Cost: a copy of what the forward has changed, on the devices where it is.
    """
    first = parts[0]
    whole = first if into is None else into
    if hasattr(first, "self_attention_cache"):
        for name in ("self_attention_cache", "cross_attention_cache"):
            its = [getattr(part, name) for part in parts]
            setattr(whole, name, put_together(its, None if into is None else getattr(into, name)))
        whole.is_updated = dict(first.is_updated)
        return whole
    for k, layer in enumerate(first.layers):
        if k >= len(whole.layers):
            whole.layers.append(layer)
        own = whole.layers[k]
        same = own is not layer and _is_view(layer.keys, own.keys)  # as it was: what an encoder gave
        kept = own.keys, own.values
        joined = [part.layers[k] for part in parts]
        vars(own).update(vars(layer))
        if same:
            own.keys, own.values = kept
        elif _filled(layer):
            own.keys = torch.cat([part.keys for part in joined])
            own.values = torch.cat([part.values for part in joined])
    return whole


def _filled(layer: Any) -> bool:
    return layer.keys is not None and layer.keys.numel() > 0


def _is_view(part: torch.Tensor | None, of: torch.Tensor | None) -> bool:
    if part is None or of is None:
        return False
    return part.numel() > 0 and part.untyped_storage()._cdata == of.untyped_storage()._cdata


def _transformers() -> Any:
    """Without importing what takes seconds: where nobody has, there are no caches."""
    return sys.modules.get("transformers.cache_utils")
