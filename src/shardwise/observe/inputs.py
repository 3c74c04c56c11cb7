"""How much a model is given: rows and tokens of a batch, from what its forward is called with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch


def rows_and_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Rows of the batch, and its tokens: the elements of the first tensor that looks like ids of tokens.

    That is ``input_ids`` where there is one, else the first integer tensor of two axes whose name says neither mask,
    label, type nor position. Padding counts.

    Returns:
        ``None`` for what cannot be told.
    """
    tensors = [(name, t) for name, t in _tensors(args, kwargs) if t.dim() > 0]
    ids = [t for name, t in tensors if name == "input_ids"] or [t for name, t in tensors if _is_ids(name, t)]
    if ids:
        return int(ids[0].shape[0]), ids[0].numel()
    return (int(tensors[0][1].shape[0]) if tensors else None), None


def _is_ids(name: str, tensor: torch.Tensor) -> bool:
    words = ("mask", "label", "type", "position", "target")
    return tensor.dtype in (torch.int64, torch.int32) and tensor.dim() == 2 and not any(w in name for w in words)


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in [*(("", a) for a in args), *kwargs.items()]:
        if isinstance(value, torch.Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors((), {str(k): v for k, v in value.items()})
        elif isinstance(value, (list, tuple)):
            yield from _tensors(tuple(value), {})
