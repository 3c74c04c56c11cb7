"""Walking nests of tensors: tuples, lists, mappings, dataclasses, and objects that hold them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


def map_tensors(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same nest of tuples, lists, mappings and dataclasses with ``change`` applied to every tensor.

    Containers are copied and keep their class; everything that is not a tensor stays as it is.
    """
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(x, change) for x in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(x, change) for x in tree)
    if isinstance(tree, dict):
        out = tree.copy()  # keeps the class, as Hugging Face's outputs need
        for key, value in tree.items():
            out[key] = map_tensors(value, change)
        return out
    if isinstance(tree, Mapping):
        return type(tree)({k: map_tensors(v, change) for k, v in tree.items()})  # type: ignore[call-arg]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        changed = {f.name: map_tensors(getattr(tree, f.name), change) for f in dataclasses.fields(tree) if f.init}
        return dataclasses.replace(tree, **changed)
    return tree


def leaves(tree: Any) -> list[Any]:
    """Everything in a nest of tuples, lists and mappings that is not itself one of these, in order."""
    if isinstance(tree, (list, tuple)):
        return [leaf for item in tree for leaf in leaves(item)]
    if isinstance(tree, Mapping):
        return [leaf for item in tree.values() for leaf in leaves(item)]
    return [tree]


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested tuples, lists, dicts, dataclasses and plain objects."""
    seen: set[int] = set()
    stack = [tree]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            if id(item) not in seen:
                seen.add(id(item))
                yield item
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif item is None or isinstance(item, (int, float, str, bytes, bool, torch.dtype, torch.device, nn.Module)):
            continue
        elif id(item) not in seen:
            seen.add(id(item))
            if hasattr(item, "__dict__"):
                stack.extend(vars(item).values())
            elif dataclasses.is_dataclass(item):
                stack.extend(getattr(item, f.name) for f in dataclasses.fields(item))
