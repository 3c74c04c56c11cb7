"""Which optimizers can step on what a rank holds: how far the update of one element looks.

A rank holds slices of parameters, whole parameters (``layout=tensor``, or a world of one rank), or all of them. What
an optimizer needs is told by the class that defines the ``step`` it runs, whatever that class is derived from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch.optim import Optimizer

from shardwise.comm.stats import Op
from shardwise.errors import OptimizerError

if TYPE_CHECKING:
    from shardwise.engine.bucket import Bucket

_TORCH = frozenset({
    "SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop",
})  # fmt: skip
ELEMENTWISE: set[str] = set(_TORCH)
"""Names of classes whose ``step`` updates an element from that element alone: those of ``torch.optim``, and what is
added. A name may be that of the class, or ``module.Class`` (for a class named like one of torch's)."""
_REFUSED = {
    "LBFGS": "its update needs inner products over all parameters",
    "SparseAdam": "sparse gradients have no flat layout",
}
_SUMS = frozenset({
    "SAM", "ASAM", "GSAM", "WSAM", "LookSAM", "DoG", "DoWG", "Mechanic", "AliG", "Lamb", "LAMB", "FusedLAMB",
})  # fmt: skip
_SUMS_BY_PREFIX = ("Prodigy", "DAdapt")


class Reach(Enum):
    """What the update of one element depends on."""

    ELEMENT = "that element alone"
    TENSOR = "its whole parameter, as far as we know"
    MODEL = "sums over all parameters"


def unhooked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A class's ``step`` without the hooks that torch puts around it."""
    found: Callable[..., Any] = step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
    return found


def step_class(optimizer: Optimizer) -> type:
    """The class that defines the ``step`` this optimizer runs. Torch puts hooked ones of a base into subclasses."""
    own = unhooked(type(optimizer).step)
    defining = [c for c in type(optimizer).__mro__ if "step" in vars(c) and unhooked(vars(c)["step"]) is own]
    return defining[-1]


def reach(optimizer: Optimizer) -> Reach:
    names = [c.__name__ for c in type(optimizer).__mro__]
    if any(name in _SUMS or name.startswith(_SUMS_BY_PREFIX) for name in names):
        return Reach.MODEL
    kind = step_class(optimizer)
    named = kind.__name__ in ELEMENTWISE and (kind.__name__ not in _TORCH or kind.__module__.startswith("torch.optim"))
    return Reach.ELEMENT if named or f"{kind.__module__}.{kind.__qualname__}" in ELEMENTWISE else Reach.TENSOR


def needs_whole_tensors(optimizer: Optimizer) -> bool:
    """Does an update mix elements of a tensor, as far as we know? Unknown classes: yes."""
    return reach(optimizer) is not Reach.ELEMENT


def check(optimizer: Optimizer, buckets: Sequence[Bucket], *, in_backward: bool = False) -> None:
    """Raise if an optimizer cannot step on what this rank holds.

    Args:
        optimizer: any.
        buckets: of its sharded parameters; empty: what can be said before they are sharded.
        in_backward: units are updated one by one.

    Raises:
        OptimizerError: all ranks raise alike.
    """
    name = type(optimizer).__name__
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _REFUSED:
            raise OptimizerError(
                f"{name} cannot train a sharded model: {_REFUSED[kind.__name__]}",
                fix="use AdamW, or another first-order optimizer",
            )
    far = reach(optimizer)
    if far is Reach.MODEL and any(b.placement.split_state or b.home is not None or in_backward for b in buckets):
        raise OptimizerError(
            f"an update by {name} depends on {far.value}, and a rank updates some of them at a time",
            fix="shard with 'ddp,layout=tensor' and without offloading, where each rank has all of them, or use AdamW",
        )
    if far is not Reach.ELEMENT and not all(b.whole_tensors for b in buckets):
        own = step_class(optimizer).__name__
        raise OptimizerError(
            f"{name} is not known to work element by element, and these parameters are cut into slices",
            where="" if own == name else f"the step of class {own}",
            fix="shard with layout=tensor, for example Strategy('zero2', layout='tensor'): each parameter then belongs "
            "whole to one rank; if its step updates each element from that element alone, say so first: "
            f"shardwise.ELEMENTWISE.add('{own if own not in _TORCH else f'{step_class(optimizer).__module__}.{own}'}')",
        )
    for group in optimizer.param_groups:
        if step_class(optimizer).__name__ == "SGD" and group.get("fused") and group.get("momentum", 0) != 0:
            mine = {id(p) for p in group["params"]}
            low = {b.master_dtype for b in buckets if any(id(p) in mine for p in b.params)}
            if low := low - {torch.float32, torch.float64}:
                raise OptimizerError(
                    f"fused SGD with momentum is wrong in {', '.join(map(str, low))} (torch 2.13)",
                    fix="pass fused=False",
                )


# --- sums over parameters that nobody told us about ------------------------------------------------------
_ROW = 64  # checksums per rank; keys share one by their names


def is_time(steps: int) -> bool:
    """Ranks compare numbers after 1, 2, 4, 8, ... steps."""
    return steps & (steps - 1) == 0


def compares(optimizer: Optimizer, buckets: Sequence[Bucket]) -> bool:
    """Could numbers come to differ between ranks? Where each has some of the parameters."""
    return (
        any(b.placement.split_state for b in buckets)
        and not buckets[0].mesh.world.fake
        and needs_whole_tensors(optimizer)
    )


def compare(optimizer: Optimizer, buckets: Sequence[Bucket]) -> None:
    """Raise if numbers in the optimizer's groups differ between ranks. Collective: 256 bytes per rank.

    They are equal at first. If they come to differ, a step has computed them from the parameters that its rank holds.

    Raises:
        OptimizerError: on every rank.
    """
    bucket = min(buckets, key=lambda b: b.place)
    group = bucket.mesh.control
    rows = torch.zeros(group.size, _ROW, dtype=torch.int32)
    mine = rows[group.rank]
    for key, text in _numbers(optimizer):
        mine[crc32(key.encode()) % _ROW] ^= crc32(text.encode()) - (1 << 31)
    op = Op("control", f"the settings of {type(optimizer).__name__}", bucket.number(5))
    group.all_gather(rows.view(-1), op).wait()
    odd = (rows != rows[0]).nonzero().tolist()
    if odd:
        rank = group.ranks[odd[0][0]]
        columns = {column for _, column in odd}
        keys = sorted({key for key, _ in _numbers(optimizer) if crc32(key.encode()) % _ROW in columns})
        raise OptimizerError(
            f"{type(optimizer).__name__} keeps numbers in its groups that differ between rank {group.ranks[0]} and "
            f"rank {rank} ({', '.join(map(repr, keys))}): its step computes them from all parameters together, and "
            "each rank has some of them",
            fix="shard with 'ddp,layout=tensor', where each rank has all of them, or use AdamW",
        )


def _numbers(optimizer: Optimizer) -> Iterator[tuple[str, str]]:
    for g, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if isinstance(value, (bool, int, float)):
                yield str(key), f"{g} {key} {value!r}"
            elif isinstance(value, torch.Tensor) and value.numel() == 1:
                yield str(key), f"{g} {key} {value.item()!r}"
