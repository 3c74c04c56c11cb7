"""What is in each part of a model, as a device map counts it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from shardwise.inference.sizes import Part, SizeOf, children_of, parts_of


class Contents:
    """The tensors of every module by name; one with several names is one, and has one size.

    Attributes:
        size_of: bytes by tensor, which goes by its ``id``.
        inside: tensors by the name of a module, or of the tensor itself.
        tied: tensors with several names; a module with two names is in one place, its buffers too.
        buffers: tensors that are buffers.
        layer: bytes of the largest layer in each part: a module that is not cut, or the tensors that one which is cut
            has of its own.

    Args:
        whole: names of classes that are not cut.
        dtype, special_dtypes: as for :class:`SizeOf`.
    """

    def __init__(
        self, model: nn.Module, whole: set[str], dtype: Any = None, special_dtypes: Mapping[str, Any] | None = None
    ) -> None:
        self.size_of: dict[int, float] = {}
        self.inside: dict[str, set[int]] = defaultdict(set)
        self.layer: dict[str, float] = {}
        self.buffers: set[int] = set()
        self._whole = whole
        size_of = SizeOf(dtype, special_dtypes)
        names: dict[int, int] = defaultdict(int)
        for name, p in model.named_parameters(remove_duplicate=False):
            names[id(p)] += 1
            self._add(name, p, size_of)
        for name, buffer in model.named_buffers(remove_duplicate=False):
            names[id(buffer)] += 1
            self.buffers.add(id(buffer))
            self._add(name, buffer, size_of)
        self.tied = {key for key, number in names.items() if number > 1}
        self._measure("", model)

    def _add(self, name: str, tensor: Any, size_of: SizeOf) -> None:
        key = id(tensor)
        if key not in self.size_of or size_of.named_specially(name):
            self.size_of[key] = size_of(name, tensor)
        steps = name.split(".")
        for i in range(len(steps) + 1):
            self.inside[".".join(steps[:i])].add(key)

    def _measure(self, name: str, module: nn.Module) -> float:
        parts = parts_of(module, name)
        for inner, part in parts:
            if not isinstance(part, nn.Module):
                self.layer[inner] = self.total(self.inside[inner])
        below = [self._measure(inner, part) for inner, part in parts if isinstance(part, nn.Module)]
        if self.can_be_cut((name, module)):
            own = {key for inner, part in parts if not isinstance(part, nn.Module) for key in self.inside[inner]}
            self.layer[name] = max([self.total(own), *below])
        else:
            self.layer[name] = self.total(self.inside[name])
        return self.layer[name]

    def start(self, model: nn.Module) -> list[Part]:
        """What there is to place at first: the parts of the model, or itself if it is not cut."""
        whole: Part = ("", model)
        return self.parts(whole) if self.can_be_cut(whole) else [whole]

    def can_be_cut(self, part: Part) -> bool:
        """Has it submodules, and is it of no class that stays whole?"""
        return bool(children_of(part[1])) and type(part[1]).__name__ not in self._whole

    def parts(self, part: Part) -> list[Part]:
        """What a module is made of, each with its whole name."""
        name, module = part
        return parts_of(module, name) if isinstance(module, nn.Module) else []

    def ids(self, parts: Iterable[Part]) -> set[int]:
        """The tensors of several parts, each once."""
        return {key for name, _ in parts for key in self.inside.get(name, ())}

    def total(self, ids: Iterable[int]) -> float:
        """Bytes of tensors."""
        return sum(self.size_of[key] for key in ids)

    def size(self, parts: Iterable[Part]) -> float:
        """Bytes of several parts; a tensor in two of them counts once."""
        return self.total(self.ids(parts))

    def together(self, part: Part, left: Sequence[Part]) -> list[Part]:
        """A part, and those of ``left`` that have to be where it is, for a tied tensor; and what these are tied to.

        Args:
            left: parts that are not placed yet.
        """
        group = [part]
        needed = self.inside.get(part[0], set()) & self.tied
        grown = bool(needed)
        names = {part[0]}
        while grown:
            grown = False
            for other in left:
                theirs = self.inside.get(other[0], set()) & self.tied
                if other[0] not in names and theirs & needed:
                    group.append(other)
                    names.add(other[0])
                    grown = grown or not theirs <= needed
                    needed |= theirs
        return group
