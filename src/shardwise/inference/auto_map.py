"""A device map made for a model: accelerators in order, then the host, then the disk."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from shardwise.inference.device_map import Place, clean_device_map
from shardwise.inference.memory import MaxMemory, get_max_memory, is_accelerator
from shardwise.inference.parts import Contents
from shardwise.inference.sizes import Part, class_names
from shardwise.inference.ties import check_tied_parameters_in_config
from shardwise.sizes import format_bytes

_log = logging.getLogger(__name__)
_DISK = "disk"


def infer_auto_device_map(
    model: nn.Module,
    max_memory: Mapping[int | str, int | float | str] | None = None,
    no_split_module_classes: str | Collection[str] | None = None,
    dtype: Any = None,
    special_dtypes: Mapping[str, Any] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
) -> dict[str, Place]:
    """A place for every parameter and buffer of a model, in the order of its modules.

    No device gets more than its budget; a tensor with several names is in one place and counts once. While anything is
    left for the host or the disk, the first accelerator keeps room for the largest layer of it, which has to be there
    when it computes, and the host keeps room for the largest one of the disk. The disk takes whatever is left.

    Args:
        model: looked at alone; it may be on ``meta``.
        max_memory: as for :func:`get_max_memory`: bytes by device; by default what is free.
        no_split_module_classes: names of classes whose modules stay in one piece.
        dtype: what floating-point tensors will be stored in, where that is smaller.
        special_dtypes: by the name of the tensor.
        verbose: print what goes where, and what is cut.
        clean_result: name modules instead of their parts where all of these are in one place.
        offload_buffers: buffers of what is on the host or the disk stay there too; else a warning tells when no
            accelerator has room for them.
        fallback_allocation: where not even the next module fits on a device, look for a later one that does.

    Raises:
        PlacementError, ConfigError: a device, a size or a dtype that is none.
    """
    search = _Search(model, get_max_memory(max_memory), class_names(no_split_module_classes), dtype, special_dtypes)
    if check_tied_parameters_in_config(model) and not search.contents.tied - search.contents.buffers:
        _log.warning("the model's weights are not tied yet: call model.tie_weights() first, or they count twice")
    search.say = print if verbose else _silent
    search.run(fallback_allocation)
    search.tell_what_is_empty()
    if not offload_buffers:
        search.warn_of_buffers()
    return clean_device_map(search.found) if clean_result else search.found


def _silent(text: str) -> None:
    pass


class _Search:
    """What is placed and what is left while a map is made."""

    def __init__(
        self, model: nn.Module, budgets: MaxMemory, whole: set[str], dtype: Any, special: Mapping[str, Any] | None
    ) -> None:
        self.contents = Contents(model, whole, dtype, special)
        self.budgets = budgets
        self.devices = [key for key in budgets if key != _DISK and budgets[key] > 0] + [_DISK]
        first = next(iter(self.devices))  # an accelerator, if there is one
        self.with_reserve: set[int | str] = {first, "cpu"} if first != "mps" else {first}
        self.left = self.contents.start(model)
        self.found: dict[str, Place] = {}
        self.on: dict[int | str, set[int]] = {key: set() for key in self.devices}
        self.used: dict[int | str, float] = dict.fromkeys(self.devices, 0)
        self.reserved: dict[int | str, float] = dict.fromkeys(self.devices, 0)
        self.too_small: dict[int | str, float] = {}
        self.say: Any = _silent

    def run(self, fallback: bool) -> None:
        """Put everything somewhere."""
        devices = iter(self.devices)
        device = next(devices)
        while self.left:
            part = self.left[0]
            group = self.contents.together(part, self.left)
            if self._fits(group, device):
                self._put(group, device)
            elif self._fits([part], device, beside=group) and (other := self._to_cut(group[1:])) is not None:
                self._cut(other)  # a tied tensor in it: the rest of it may go elsewhere
            elif not self._fits([part], device, beside=group) and self.contents.can_be_cut(part):
                self._cut(part)
            elif fallback and not self.on[device] and (later := self._later(device)) is not None:
                self._put(later, device)
            else:
                self.reserved[device] = self._reserve(group, device)
                if not self.on[device]:
                    self.too_small[device] = self.contents.size(group) + self.reserved[device]
                device = next(devices)

    def _fits(self, parts: list[Part], device: int | str, beside: list[Part] | None = None) -> bool:
        if device == _DISK:
            return True
        more = self.contents.total(self.contents.ids(parts) - self.on[device])
        return self.used[device] + more + self._reserve(beside or parts, device) <= self.budgets[device]

    def _reserve(self, group: list[Part], device: int | str) -> float:
        """Bytes that stay free for the largest layer of what is not placed yet."""
        if device not in self.with_reserve:
            return 0
        names = {name for name, _ in group}
        return max((self.contents.layer[name] for name, _ in self.left if name not in names), default=0)

    def _put(self, group: list[Part], device: int | str) -> None:
        names = [name for name, _ in group]
        self.say(f"{', '.join(names)}: {format_bytes(self.contents.size(group))}, on {device}")
        self.found.update(dict.fromkeys(names, device))
        new = self.contents.ids(group) - self.on[device]
        self.on[device] |= new
        self.used[device] += self.contents.total(new)
        gone = set(names)
        self.left = [part for part in self.left if part[0] not in gone]

    def _to_cut(self, parts: Iterable[Part]) -> Part | None:
        return next((part for part in parts if self.contents.can_be_cut(part)), None)

    def _cut(self, part: Part) -> None:
        self.say(f"{part[0]}: cut into its parts")
        at = next(i for i, (name, _) in enumerate(self.left) if name == part[0])
        self.left[at : at + 1] = self.contents.parts(part)

    def _later(self, device: int | str) -> list[Part] | None:
        """The first part of what is left that fits, with what is tied to it; what is around it is cut."""
        waiting = list(self.left)
        before = self.left
        while waiting:
            part = waiting.pop(0)
            group = self.contents.together(part, self.left)
            if self._fits(group, device):
                return group
            if self.contents.can_be_cut(part):
                self._cut(part)
                waiting[:0] = self.contents.parts(part)
        self.left = before
        return None

    def tell_what_is_empty(self) -> None:
        for device, size in self.too_small.items():
            _log.info(
                "nothing is on device %s, for insufficient memory: %s would be needed for the next part of the model "
                "and, on the first device and the host, for the largest layer that has to come there",
                device,
                format_bytes(size),
            )

    def warn_of_buffers(self) -> None:
        """Buffers of offloaded parts stay on an accelerator: is there one with room for them?"""
        away = (self.on.get("cpu", set()) | self.on[_DISK]) & self.contents.buffers
        accelerators = [key for key in self.devices if is_accelerator(key)]
        size = self.contents.total(away)
        room = [self.budgets[key] - self.reserved[key] - self.used[key] for key in accelerators]
        if size and room and max(room) < size:
            warnings.warn(
                f"the buffers of offloaded layers take {format_bytes(size)}, and no accelerator has as much left: "
                "with offload_buffers=True they stay with their layers",
                stacklevel=3,
            )
