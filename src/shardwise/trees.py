"""Walking nests: lists, tuples, mappings and dataclasses, and what is in them.

A *container* is a list, a tuple, a mapping or a dataclass instance; a *leaf* is anything else. What is made out of a
container has its class.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import nn

from shardwise.errors import TensorError


def is_tensor(item: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(item, torch.Tensor)


def is_named_tuple(item: Any) -> bool:
    return isinstance(item, tuple) and hasattr(item, "_fields") and hasattr(item, "_asdict")


def _fields(tree: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(tree) if hasattr(tree, field.name)]


def children(tree: Any) -> Collection[Any] | None:
    """What is directly in a container, in order; ``None`` for a leaf."""
    if isinstance(tree, (list, tuple)):
        return tree
    if isinstance(tree, Mapping):
        return tree.values()
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [getattr(tree, name) for name in _fields(tree)]
    return None


def steps(tree: Any) -> list[str]:
    """How each child of a container is reached, as Python spells it: ``[0]``, ``['loss']``, ``.logits``."""
    if isinstance(tree, (list, tuple)):
        return [f"[{i}]" for i in range(len(tree))]
    if isinstance(tree, Mapping):
        names = [f"[{_spelled(key)}]" for key in tree]
        return names if len({*names}) == len(names) else [f"{name[:-1]}, number {i}]" for i, name in enumerate(names)]
    return [f".{name}" for name in _fields(tree)]


def _spelled(key: Any) -> str:
    """A key of a mapping, alike in every process: without addresses in memory."""
    plain = type(key).__repr__ is object.__repr__
    return getattr(key, "__qualname__", None) or (type(key).__qualname__ if plain else repr(key))


def rebuilt(tree: Any, items: Iterable[Any]) -> Any:
    """A container of the class of ``tree``, with ``items`` in place of its children."""
    if isinstance(tree, (list, tuple)):
        return type(tree)(*items) if is_named_tuple(tree) else type(tree)(items)
    if isinstance(tree, dict):
        out = tree.copy()  # keeps the class, as defaultdict and Hugging Face's outputs need
        for key, item in zip(tree, items, strict=True):
            out[key] = item
        return out
    if isinstance(tree, Mapping):
        return type(tree)(dict(zip(tree, items, strict=True)))  # type: ignore[call-arg]
    out = copy.copy(tree)  # not made anew: __init__ and __post_init__ may ask for more, or change what they get
    for name, item in zip(_fields(tree), items, strict=True):
        object.__setattr__(out, name, item)  # frozen ones too
    return out


def map_leaves(
    tree: Any,
    change: Callable[[Any], Any],
    chosen: Callable[[Any], bool],
    others: Callable[[Any], Any] | None = None,
    skip_keys: Collection[Any] = (),
) -> Any:
    """The same nest with ``change`` applied to some of its items.

    Args:
        chosen: which; asked before an item is entered, so it may choose containers.
        others: applied to leaves that are not chosen; by default they stay as they are.
        skip_keys: keys of mappings whose values stay as they are.
    """
    if chosen(tree):
        return change(tree)
    inside = children(tree)
    if inside is None:
        return tree if others is None else others(tree)
    if skip_keys and isinstance(tree, Mapping):
        return rebuilt(
            tree,
            [v if k in skip_keys else map_leaves(v, change, chosen, others, skip_keys) for k, v in tree.items()],
        )
    return rebuilt(tree, [map_leaves(item, change, chosen, others, skip_keys) for item in inside])


def map_tensors(tree: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """The same nest with ``change`` applied to every tensor; everything else stays as it is."""
    return map_leaves(tree, change, is_tensor)


def join(
    trees: Sequence[Any], combine: Callable[[list[Any]], Any], whole: Callable[[Sequence[Any]], bool] | None = None
) -> Any:
    """Nests of one form as one: ``combine`` gets what stands in one place. Mappings are matched by key.

    Args:
        whole: may say of containers in one place that they are combined as they are; by default only leaves are.

    Raises:
        TensorError: the nests have different forms.
    """
    first = trees[0]
    if children(first) is None or (whole is not None and whole(trees)):
        return combine(list(trees))
    rows = []
    for tree in trees:
        row = _in_order_of(first, tree)
        if row is None:
            raise TensorError(
                f"nests of different forms cannot be joined: {steps(first)} in one, "
                f"{steps(tree) if children(tree) is not None else type(tree).__name__} in another",
                fix="bring the same containers, of the same lengths and keys",
            )
        rows.append(row)
    return rebuilt(first, [join(column, combine, whole) for column in zip(*rows, strict=True)])


def _in_order_of(first: Any, tree: Any) -> list[Any] | None:
    """The children of ``tree`` as those of ``first`` stand; ``None`` if they are not the same ones."""
    inside = children(tree)
    if inside is None or len(inside) != len(children(first) or ()):
        return None
    if isinstance(first, Mapping) or isinstance(tree, Mapping):
        both = isinstance(first, Mapping) and isinstance(tree, Mapping)
        return [tree[key] for key in first] if both and all(key in tree for key in first) else None
    return list(inside)


def leaves(tree: Any) -> list[Any]:
    """Every leaf of a nest, in order."""
    inside = children(tree)
    return [tree] if inside is None else [leaf for item in inside for leaf in leaves(item)]


def named_leaves(tree: Any, name: str = "") -> list[tuple[str, Any]]:
    """(how it is reached, leaf) for every leaf of a nest, in order: ``("['losses'][0]", tensor)``."""
    inside = children(tree)
    if inside is None:
        return [(name, tree)]
    return [pair for step, item in zip(steps(tree), inside, strict=True) for pair in named_leaves(item, name + step)]


def with_leaves(tree: Any, values: Iterable[Any]) -> Any:
    """The same nest with other leaves, given in order."""
    coming = iter(values)
    return map_leaves(tree, lambda _: next(coming), lambda item: children(item) is None)


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested containers, sets and plain objects; no module's."""
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
