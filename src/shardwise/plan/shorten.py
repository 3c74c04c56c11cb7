"""A model with fewer of its repeated blocks: what one more adds does not depend on how many there are."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_INDEX = re.compile(r"(^|_)(idx|index|layer_id|layer_number|layer_num|block_id)$")
_COUNT = re.compile(r"layer|block|depth")


@dataclass(frozen=True)
class Kind:
    """Blocks of a model that are built alike, and run one after the other.

    Attributes:
        name: where they are, and which kind it is there: ``model.layers#0``.
        block: their class's name.
        count: of them in the whole model.
        kept: of them in the shortened one.
    """

    name: str
    block: str
    count: int
    kept: int


def shorten(model: nn.Module, keep: int | Mapping[str, int]) -> tuple[Kind, ...]:
    """Cut each run of blocks that are built alike down to a few of them, in place.

    Blocks are the children of a ``ModuleList`` or ``Sequential``. Alike are those with the same classes, shapes, dtypes
    and settings inside, and the same entries in those lists of the model's configuration that have one for each block.
    The first ones of each kind stay, in their order. Blocks inside of blocks stay as they are. Lists that a module has
    beside each other, and that are equally long, are cut together. A count of layers that a module or a configuration
    keeps beside the list follows.

    Args:
        model: changed in place; its configuration (``model.config``), too.
        keep: how many of each kind, 1 or more; or by the kind's name, where others stay whole.

    Returns:
        The kinds, in the order of the model; also those that have only one block beside others of their list. Empty if
        nothing repeats.

    Raises:
        ValueError: fewer than one.
    """
    wanted = keep if isinstance(keep, int) else min(keep.values(), default=1)
    if wanted < 1:
        raise ValueError(f"keep must be 1 or more of each kind, not {wanted}")
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            holders.setdefault(id(tensor), set()).add(id(module))
    shared = {tensor for tensor, modules in holders.items() if len(modules) > 1}
    found: list[Kind] = []
    _descend(model, "", keep, shared, found, set())
    return tuple(found)


def _descend(
    parent: nn.Module,
    path: str,
    keep: int | Mapping[str, int],
    shared: set[int],
    found: list[Kind],
    seen: set[int],
) -> None:
    if id(parent) in seen:
        return
    seen.add(id(parent))
    done: set[str] = set()
    children = [(name, child) for name, child in parent._modules.items() if child is not None]
    for name, child in children:
        if name in done:
            continue
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) > 1:
            beside = [n for n, c in children if n not in done and type(c) is type(child) and len(c) == len(child)]
            if _cut(parent, path, beside, keep, shared, found):
                done.update(beside)
                continue
        _descend(child, f"{path}{name}.", keep, shared, found, seen)


def _cut(
    parent: nn.Module,
    path: str,
    names: list[str],
    keep: int | Mapping[str, int],
    shared: set[int],
    found: list[Kind],
) -> bool:
    """Cut lists that lie beside each other; whether something in them repeats."""
    lists: list[Any] = [parent._modules[name] for name in names]
    total = len(lists[0])
    if any(next(block.parameters(), None) is None for each in lists for block in each):
        return False
    configs = _configs(parent, lists)
    tables = [(c, key, v) for c in configs for key, v in list(vars(c).items()) if _per_block(v, total)]
    alike: dict[Hashable, list[int]] = {}
    for i in range(total):
        entries = tuple(_plain(values[i]) for _, _, values in tables if list(values) != list(range(total)))
        alike.setdefault((entries, *(_signature(each[i], shared) for each in lists)), []).append(i)
    if max(map(len, alike.values())) == 1:
        return False
    stay: list[int] = []
    for number, members in enumerate(alike.values()):
        name = f"{path}{names[0]}#{number}"
        some = keep if isinstance(keep, int) else keep.get(name, len(members))
        kept = members[:some]
        found.append(Kind(name, type(lists[0][members[0]]).__name__, len(members), len(kept)))
        stay += kept
    stay.sort()
    if len(stay) == total:
        return True
    for each in lists:
        blocks = list(each._modules.items())
        numbered = [key for key, _ in blocks] == [str(i) for i in range(total)]
        each._modules.clear()
        each._modules.update({str(n) if numbered else blocks[i][0]: blocks[i][1] for n, i in enumerate(stay)})
        _renumber(each)
    for config, key, values in tables:
        places = list(values) == list(range(total))
        vars(config)[key] = type(values)(range(len(stay)) if places else (values[i] for i in stay))
    for owner in (parent, *configs):
        for key, value in list(vars(owner).items()):
            if type(value) is int and value == total and _COUNT.search(key):
                vars(owner)[key] = len(stay)
    return True


def _renumber(blocks: Any) -> None:
    """A block that knows its own place learns the new one, since it looks itself up there."""
    for place, block in enumerate(blocks):
        for module in block.modules():
            for key, value in vars(module).items():
                if type(value) is int and _INDEX.search(key):
                    vars(module)[key] = place


def _configs(parent: nn.Module, lists: list[Any]) -> list[Any]:
    """The configurations that a module and its blocks carry: objects of another library, known by their name."""
    found: dict[int, Any] = {}
    for module in (parent, *(inner for each in lists for block in each for inner in block.modules())):
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "__dict__") and not isinstance(config, nn.Module):
            found[id(config)] = config
    return list(found.values())


def _per_block(value: Any, total: int) -> bool:
    return type(value) in (list, tuple) and len(value) == total and all(_simple(v) for v in value)


def _simple(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))


def _plain(value: Any) -> Hashable:
    """A setting as it matters: of a fraction only whether there is one (rates of dropping paths differ by block)."""
    if isinstance(value, float):
        return bool(value)
    if isinstance(value, (list, tuple)):
        return tuple(_plain(v) for v in value if _simple(v) or isinstance(v, (list, tuple)))
    return value if isinstance(value, Hashable) else None


def _signature(block: nn.Module, shared: set[int]) -> Hashable:
    parts: list[Hashable] = []
    for name, module in block.named_modules():
        settings = tuple(
            (key, _plain(value))
            for key, value in sorted(vars(module).items())
            if (_simple(value) or isinstance(value, (list, tuple))) and not _INDEX.search(key)
        )
        tensors = tuple(
            (key, tuple(t.shape), t.dtype, t.requires_grad, id(t) if id(t) in shared else 0)
            for own in (module._parameters, module._buffers)
            for key, t in own.items()
            if t is not None
        )
        parts.append((name, type(module), settings, tensors))
    return tuple(parts)
