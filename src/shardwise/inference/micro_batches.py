"""A forward in pieces along the batch, so that the devices of one model compute at the same time.

The host tells a device that runs late what to do, and goes on. So pieces are told one after the other, all of a model's
devices each: while device 1 computes the first piece, device 0 has the second one to compute. Nothing is waited for in
between, and there are no threads. What comes out is put together once all are told.

A piece computes as the same rows by themselves do: equal to the whole batch to rounding. Caches of keys and values stay
what they are: a piece gets its rows of them, and they are put together afterwards.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from shardwise import device as devices
from shardwise.engine.uncompiled import uncompiled
from shardwise.errors import TensorError, UnitError
from shardwise.inference.cache_rows import can_be_cut, is_cache, put_together, rows_of
from shardwise.inference.plan import DEVICE, WeightsPlan
from shardwise.inference.several_devices import PlanOfDevices
from shardwise.trees import is_tensor, join, leaves, map_leaves

_log = logging.getLogger(__name__)
TOKENS = 512
"""Tokens of a piece for which weights that are read once more do not cost more than is won."""
_ROWS = {
    "input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "decoder_input_ids",
    "decoder_inputs_embeds", "decoder_attention_mask", "encoder_outputs",
}  # fmt: skip
"""Arguments of models of transformers that have the batch along dim 0, or one row for all."""
_LEADING = {"input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds"}
"""Those of them that say how large the batch is."""
_FOR_ALL = {"cache_position", "logits_to_keep"}


def use_pieces(module: nn.Module, count: int | None, plan: WeightsPlan) -> None:
    """Let forwards without gradients run in pieces, where that is right and asked for.

    Args:
        count: pieces, or as many as there are rows; ``None``: where several devices run late and a model of
            transformers has all weights on them, as many as there are :data:`TOKENS` tokens, and twice as many as
            devices at most.
        plan: where the weights are.
    """
    places = list(plan.plans) if isinstance(plan, PlanOfDevices) else []
    if count is None:
        late = len(places) > 1 and all(map(devices.runs_late, places))
        count = None if late and _resident(plan) and _of_transformers(module) else 1
    if count != 1:
        _Pieces(count, 2 * len(places)).put_on(module)


def check_pieces(count: int | None, plan: WeightsPlan) -> None:
    """Raise if a number of pieces makes no sense.

    Raises:
        UnitError: it is none, or weights are not on the devices: each piece would bring them.
    """
    if count is None:
        return
    if not isinstance(count, int) or count < 1:
        raise UnitError(f"micro_batches={count!r}", fix="a number of pieces; None lets the model choose")
    if count > 1 and not _resident(plan):
        raise UnitError(
            f"micro_batches={count}, and weights that are not on a device: each piece would bring them again",
            fix="leave micro_batches out, or keep all weights on devices",
        )


def _resident(plan: WeightsPlan) -> bool:
    return plan.parts == 1 and all(home == DEVICE for home in plan.homes.values())


def _of_transformers(module: nn.Module) -> bool:
    return hasattr(module, "_no_split_modules")


class _Cut:
    """A call in pieces.

    Args:
        args, kwargs: of the whole.
        names: of ``args``.
        sizes: rows of each piece.
        known: only arguments that are known to have rows are cut; else all tensors with as many rows as the batch.
    """

    def __init__(self, args: Any, kwargs: Any, names: Sequence[str], sizes: Sequence[int], *, known: bool) -> None:
        self.args, self.kwargs, self.sizes, self.known = args, kwargs, sizes, known
        self.caches: list[tuple[Any, list[Any]]] = []  # each whole one, and its pieces
        self.possible = True
        rows = {name: self._pieces(name, value) for name, value in [*zip(names, args, strict=True), *kwargs.items()]}
        self.pieces = [
            (tuple(rows[name][k] for name in names), {name: rows[name][k] for name in kwargs})
            for k in range(len(sizes) if self.possible else 0)
        ]

    def _pieces(self, name: str, value: Any) -> list[Any]:
        starts = [sum(self.sizes[:k]) for k in range(len(self.sizes))]
        if is_cache(value):
            if not can_be_cut(value):
                self.possible = False
                return []
            parts = [rows_of(value, at, at + n) for at, n in zip(starts, self.sizes, strict=True)]
            self.caches.append((value, parts))
            return parts
        tensors = [leaf for leaf in leaves(value) if is_tensor(leaf)]
        if not tensors or (self.known and name in _FOR_ALL):
            return [value] * len(starts)
        if self.known and (name not in _ROWS or any(t.ndim < 1 or t.shape[0] not in (1, self.rows) for t in tensors)):
            self.possible = False
            return []
        return [
            map_leaves(value, partial(self._rows_of, at, at + n), is_tensor)
            for at, n in zip(starts, self.sizes, strict=True)
        ]

    @property
    def rows(self) -> int:
        return sum(self.sizes)

    def _rows_of(self, start: int, stop: int, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[start:stop] if tensor.ndim > 0 and tensor.shape[0] == self.rows else tensor

    def fits(self, output: Any) -> bool:
        """Can what the first piece gave be put together with that of others?"""
        for leaf in leaves(output):
            if is_tensor(leaf):
                if leaf.ndim < 1 or leaf.shape[0] != self.sizes[0]:
                    return False
            elif is_cache(leaf):
                if not can_be_cut(leaf):
                    return False
            elif leaf is not None and not isinstance(leaf, (bool, int, float, str)):
                return False
        return True

    def whole(self, outputs: Sequence[Any]) -> Any:
        """The outputs of all pieces as one."""
        for cache, parts in self.caches:
            put_together(parts, cache)
        return join(outputs, self._join)

    def _join(self, found: list[Any]) -> Any:
        first = found[0]
        if is_tensor(first):
            return torch.cat(found)
        if is_cache(first):
            mine = next((cache for cache, parts in self.caches if parts[0] is first), None)
            return put_together(found, None) if mine is None else mine
        if any(other != first for other in found[1:]):
            raise TensorError(
                f"micro-batches gave {', '.join(map(str, found))} in one place of their outputs",
                fix="micro_batches=1, or return tensors with a row for each of the batch",
            )
        return first


class _Pieces:
    """Hooks on the root: the call computes the first piece; what follows it, the others.

    Args:
        count: see :func:`use_pieces`.
        most: pieces, if that is ``None``.
    """

    def __init__(self, count: int | None, most: int) -> None:
        self.count, self.most = count, most
        self._names: list[str] = []  # of arguments
        self._known = self._said = False
        self._under_way: list[_Cut | None] = []
        self._whole: set[object] = set()  # ways of calling it whose outputs cannot be put together

    def put_on(self, module: nn.Module) -> None:
        """Install them: inside of those that move inputs and outputs of the root."""
        self._known = _of_transformers(module)
        self._names = list(inspect.signature(module.forward).parameters) if self._known else []
        module.register_forward_pre_hook(self.enter, with_kwargs=True)
        module.register_forward_hook(self.leave, prepend=True, always_call=True)

    @uncompiled
    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before the forward of what is then the first piece."""
        cut = None if torch.is_grad_enabled() or _way(kwargs) in self._whole else self._cut(args, kwargs)
        self._under_way.append(cut)
        return None if cut is None else cut.pieces[0]

    def _cut(self, args: Any, kwargs: Any) -> _Cut | None:
        names = self._names[: len(args)] + [f"[{k}]" for k in range(len(self._names), len(args))]
        if self._known:
            given = [value for name, value in [*zip(names, args, strict=True), *kwargs.items()] if name in _LEADING]
            leading = max(filter(is_tensor, given), key=lambda t: t.shape[:2].numel(), default=None)
        else:
            leading = next(filter(is_tensor, leaves([args, kwargs])), None)
        if leading is None or leading.ndim < 1:
            return None
        rows = leading.shape[0]
        count = min(self.most, leading.shape[:2].numel() // TOKENS) if self.count is None else self.count
        count = min(count, rows)
        if count < 2:
            return None
        sizes = [rows * (k + 1) // count - rows * k // count for k in range(count)]
        cut = _Cut(args, kwargs, names, sizes, known=self._known)
        if cut.possible:
            return cut
        self._say("it has arguments that are not known to have a row for each of the batch")
        return None

    def _say(self, why: str) -> None:
        if self.count is not None and not self._said:
            _log.warning("micro_batches=%s, and the model runs whole: %s", self.count, why)
        self._said = True

    @uncompiled
    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After it."""
        cut = self._under_way.pop() if self._under_way else None
        if cut is None or (output is None and sys.exc_info()[1] is not None):
            return None
        if not cut.fits(output):
            self._whole.add(_way(cut.kwargs))
            self._say("there are outputs without a row for each of the batch")
            return module.forward(*cut.args, **cut.kwargs)
        return cut.whole([output, *(module.forward(*a, **k) for a, k in cut.pieces[1:])])


def _way(kwargs: Any) -> object:
    """What is asked for, beside the numbers."""
    return frozenset((name, value) for name, value in kwargs.items() if isinstance(value, (bool, str)))
