"""Which module subtrees become units."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from shardwise.errors import UnitError


class Chosen(frozenset[int]):
    """Units that somebody has picked, by ``id`` of their modules: any of them, also none."""


UnitRule = Chosen | str | type[nn.Module] | Iterable[type[nn.Module]] | Callable[[str, nn.Module], bool] | None


def select_units(root: nn.Module, rule: UnitRule = None) -> list[tuple[str, nn.Module]]:
    """(name, module) of every unit below ``root``, in registration order; ``root`` itself is not listed.

    Args:
        rule: a module class or several; a class name; a predicate ``(name, module) -> bool``; or ``None``
            for the default: repeated blocks (the children of a ``ModuleList`` or ``Sequential`` that are all
            of one class), and what else is at least half as large as a block. A model without repeated
            blocks is cut by size, into subtrees of at most an eighth of it.

    A root without a forward has its parts called by the script: what can be called by itself is a unit besides.

    Raises:
        UnitError: the rule matches nothing.
    """
    found = _by_rule(root, rule)
    if has_forward(root):
        return found
    chosen = {id(module) for _, module in [*found, *_beside(root, "", set())]}
    return [(name, module) for name, module in root.named_modules() if id(module) in chosen]


def _by_rule(root: nn.Module, rule: UnitRule) -> list[tuple[str, nn.Module]]:
    if rule is None:
        return _by_default(root)
    if isinstance(rule, Chosen):
        return [(name, module) for name, module in root.named_modules() if module is not root and id(module) in rule]
    if isinstance(rule, str):
        wanted = rule
        found = _outermost_all(root, lambda n, m: type(m).__name__ == wanted)
    elif isinstance(rule, type):
        kind = rule
        found = _outermost_all(root, lambda n, m: isinstance(m, kind))
    elif callable(rule):
        found = _outermost_all(root, rule)
    else:
        kinds = tuple(rule)
        found = _outermost_all(root, lambda n, m: isinstance(m, kinds))
    if not found:
        raise UnitError(
            f"units={rule!r} matches no module of {type(root).__name__}",
            fix="give a module class that occurs in the model, or leave units out for the default",
        )
    return found


def _outermost_all(root: nn.Module, match: Callable[[str, nn.Module], bool]) -> list[tuple[str, nn.Module]]:
    out = []
    for name, module in root.named_modules():
        if module is not root and _has_params(module) and match(name, module):
            if not has_forward(module):
                raise UnitError(
                    f"'{name}' ({type(module).__name__}) has no forward, so it cannot be a unit",
                    fix="choose the modules inside it",
                )
            out.append((name, module))
    return out


def has_forward(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward or "forward" in vars(module)


def numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _has_params(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _by_default(root: nn.Module) -> list[tuple[str, nn.Module]]:
    blocks: list[tuple[str, nn.Module]] = []
    inside: list[str] = []
    for name, module in root.named_modules():
        if any(name == b or name.startswith(b + ".") for b in inside):
            continue
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            children = list(module.named_children())
            kinds = {type(c) for _, c in children}
            if len(children) > 1 and len(kinds) == 1 and all(_has_params(c) and has_forward(c) for _, c in children):
                prefix = f"{name}." if name else ""
                blocks += [(prefix + n, c) for n, c in children]
                inside += [prefix + n for n, _ in children]
    if not blocks:
        return _by_size(root, "", max(numel(root) // 8, 1)) if numel(root) >= 1 << 20 else []
    large = max(numel(c) for _, c in blocks) // 2
    found = dict(blocks)
    found |= {name: module for name, module in _beside(root, "", set(found)) if numel(module) >= max(large, 1)}
    return [(name, found[name]) for name, module in root.named_modules() if found.get(name) is module]


def _beside(module: nn.Module, name: str, blocks: set[str]) -> list[tuple[str, nn.Module]]:
    """The largest callable subtrees that neither contain a block nor lie in one."""
    out = []
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        if full in blocks or not _has_params(child):
            continue
        if any(b.startswith(full + ".") for b in blocks) or not has_forward(child):
            out += _beside(child, full, blocks)
        else:
            out.append((full, child))
    return out


def _by_size(module: nn.Module, name: str, limit: int) -> list[tuple[str, nn.Module]]:
    out: list[tuple[str, nn.Module]] = []
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}" if name else child_name
        if not _has_params(child):
            continue
        small = numel(child) <= limit or not any(_has_params(c) for c in child.children())
        if small and has_forward(child):
            out.append((full, child))
        else:
            out += _by_size(child, full, limit)
    return out
