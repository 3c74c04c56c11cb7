"""A model whose parts are on several devices: what a call takes with it when it goes from one to another.

A *station* is a module that computes on a device which what comes to it may not be on: its tensors are moved there as
it is called. What it returns goes back to the device of the code around it, since that may do anything with it; but
within a chain, where it only goes on to the next station, it stays:

- of ``nn.Sequential``, all but the last module are such a chain;
- models that name the blocks that must not be cut (``_no_split_modules``, as those of transformers do) are written so
  that what comes behind a block takes values wherever they are.

The root is a station, too: its inputs go to the main device, and its outputs to where the inputs were.

What several blocks get (a mask, rotations) is moved once: at each copy device 0 has to wait for device 1.
Devices that run late are not waited for: torch orders a copy between two of them with the work of both.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Mapping
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import nn

from shardwise.engine.stations import Members, Where, stations
from shardwise.engine.uncompiled import uncompiled
from shardwise.errors import UnitError
from shardwise.trees import children, is_tensor, leaves, rebuilt


def install(root: nn.Module, of_unit: Members, places: Mapping[str, torch.device]) -> None:
    """Let a model run on devices that its inputs may not be on, and move its buffers to where they are used.

    Cost: with one device, a look at the inputs and outputs of the root.

    Args:
        of_unit: which unit answers for which parameters, as :func:`keep_together` left it.
        places: the device of each unit by name; that of the root, ``""``, is the main one.
    """
    chain = bool(getattr(root, "_no_split_modules", None))
    skip = getattr(root, "_skip_keys_device_placement", None) or ()
    moves = _Moves((skip,) if isinstance(skip, str) else frozenset(skip))
    main = places[""]
    if any(device != main for device in places.values()):
        where = Where(root, of_unit, places)
        _move_buffers(root, where)
        for module in root.modules():
            vars(module)["_apply"] = _refuse_to_move
        seen: set[nn.Module] = set()  # one may have two names
        for module, device, back in stations(root, "", main, where, chain=chain, nested=False):
            if module not in seen:
                seen.add(module)
                _Station(device, back, moves).put_on(module)
    _Ends(main, moves).put_on(root)


def _move_buffers(root: nn.Module, where: Where) -> None:
    moved: dict[tuple[int, torch.device], tuple[torch.Tensor, ...]] = {}  # one buffer under two names stays one
    for name, module in root.named_modules():
        device = where.of(name)
        for key, buffer in module._buffers.items():
            if buffer is not None:
                *_, there = moved.setdefault((id(buffer), device), (buffer, buffer.to(device)))
                module._buffers[key] = there


@uncompiled
def _refuse_to_move(change: Any, recurse: bool = True) -> Any:
    """In place of ``nn.Module._apply``."""
    raise UnitError(
        "the model is on several devices, and cannot be moved or converted as a whole (.to(), .half(), .cuda())",
        fix="load it again: with dtype=..., or with device_map={'': device} on one device",
    )


class _Moves:
    """Brings tensors to devices.

    Args:
        skip: names of arguments, and keys of mappings, that stay where they are.

    Attributes:
        calls: of the root that are under way.
    """

    def __init__(self, skip: Collection[str]) -> None:
        self.skip, self.calls = skip, 0
        # Per tensor (by id) and device: a reference to the tensor, what it is there, and the versions of both.
        self._known: dict[tuple[int, torch.device], tuple[weakref.ref[torch.Tensor], torch.Tensor, int, int]] = {}

    def __deepcopy__(self, memo: Any) -> _Moves:
        new = memo[id(self)] = _Moves(self.skip)
        return new

    def each(self, tree: Any, move: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        """The same nest with every tensor moved; it itself if none was."""
        if isinstance(tree, torch.Tensor):
            return move(tree)
        inside = children(tree)
        if not inside:
            return tree
        keys = list(tree) if isinstance(tree, Mapping) else None
        items = [
            item if keys is not None and keys[i] in self.skip else self.each(item, move)
            for i, item in enumerate(inside)
        ]
        return tree if all(map(is_, items, inside)) else rebuilt(tree, items)

    def forth(self, device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of another device on this one. It is brought once, as long as it is alive."""
        if tensor.device == device or (self.calls and tensor.device.type != device.type):
            return tensor  # what the model keeps on the host stays there; a part that is called by itself gets inputs
        if not _has_versions(tensor) or tensor.device.type != device.type:
            return tensor.to(device, non_blocking=True)
        found = self._known.get((id(tensor), device))
        if found is not None:
            of, there, version, its = found
            if of() is tensor and version == tensor._version and its == there._version:
                return there
        there = tensor.to(device, non_blocking=True)
        self._note(tensor, there)
        return there

    def back(self, device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
        """What a station computed, for the code around it. The next station may want it where it was."""
        if tensor.device == device or tensor.device.type != device.type:
            return tensor
        there = tensor.to(device, non_blocking=True)
        if _has_versions(tensor):
            self._note(there, tensor)
        return there

    def _note(self, tensor: torch.Tensor, there: torch.Tensor) -> None:
        """Keep ``there`` as long as ``tensor`` is alive."""
        key = id(tensor), there.device
        of = weakref.ref(tensor, partial(_forget, weakref.ref(self), key))
        self._known[key] = of, there, tensor._version, there._version


def _has_versions(tensor: torch.Tensor) -> bool:
    """Can it be noticed that it was written to? With gradients each use has a graph of its own besides."""
    return not torch.is_grad_enabled() and not tensor.is_inference()


def _forget(moves: weakref.ref[_Moves], key: tuple[int, torch.device], gone: object) -> None:
    found = moves()
    if found is not None and (entry := found._known.get(key)) is not None and entry[0] is gone:
        del found._known[key]


class _Station:
    """Hooks on a module that computes on a device of its own.

    Args:
        back: where its outputs go; ``None``: they stay.
    """

    def __init__(self, device: torch.device, back: torch.device | None, moves: _Moves) -> None:
        self.device, self.back, self.moves = device, back, moves

    def put_on(self, module: nn.Module) -> None:
        """Install it."""
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        if self.back is not None and self.back != self.device:
            module.register_forward_hook(self.leave)

    @uncompiled
    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before the forward."""
        given = (args, kwargs)
        moved = self.moves.each(given, partial(self.moves.forth, self.device))
        return None if moved is given else moved

    @uncompiled
    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After it."""
        assert self.back is not None
        return self.moves.each(output, partial(self.moves.back, self.back))


class _Ends:
    """Hooks on the root."""

    def __init__(self, main: torch.device, moves: _Moves) -> None:
        self.main, self.moves = main, moves
        self._from: list[torch.device] = []  # of calls under way

    def put_on(self, module: nn.Module) -> None:
        """Install it."""
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        module.register_forward_hook(self.leave, always_call=True)

    @uncompiled
    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before the forward."""
        first = next(filter(is_tensor, leaves([args, kwargs])), None)
        self._from.append(self.main if first is None else first.device)
        self.moves.calls += 1
        return self.moves.each((args, kwargs), _to(self.main))

    @uncompiled
    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After it, also if it has failed."""
        if not self._from:
            return None  # it failed before it had begun
        came_from = self._from.pop()
        self.moves.calls -= 1
        error = sys.exc_info()[1]
        if output is None and error is not None:
            if isinstance(error, RuntimeError) and "same device" in str(error):
                error.add_note(
                    "shardwise: the parts of this model are on several devices, and code between them has taken "
                    "tensors of two. Give what belongs together one device in device_map."
                )
            return None
        return self.moves.each(output, _to(came_from))


def _to(device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor if tensor.device == device else tensor.to(device, non_blocking=device.type != "cpu")
