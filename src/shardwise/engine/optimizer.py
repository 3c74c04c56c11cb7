"""Any torch optimizer, stepping on the pieces this rank holds.

``optimizer.param_groups`` always shows the model's own parameters. For the length of ``step()`` (and of
``state_dict()`` and ``load_state_dict()``) they are exchanged for the held pieces of the master values:
1-D slices, or whole tensors under ``layout=tensor``. The pieces are cut by the world size alone, so the same
kernel runs over the same ranges under every strategy. Hooks on all optimizers
(``register_optimizer_step_pre_hook``) see one before it allocates state, whenever it was built.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from shardwise.comm import World
from shardwise.engine import later, offload
from shardwise.engine.bucket import Bucket
from shardwise.engine.later import Update
from shardwise.engine.offload import Part, part_of
from shardwise.engine.readers import wait_for_readers
from shardwise.engine.unit import Unit, unit_of
from shardwise.errors import OptimizerError
from shardwise.tiers.swapped_tensor import SwappedTensor, fetch

ELEMENTWISE: set[str] = {
    "SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "NAdam", "RAdam", "Adamax", "Adadelta", "ASGD", "Rprop",
}  # fmt: skip
"""Names of optimizers whose update of an element depends on that element alone."""
_REFUSED = {
    "LBFGS": "its update needs inner products over all parameters",
    "SparseAdam": "sparse gradients have no flat layout",
}

PER_PARAMETER = {"step", "eta", "mu", "mu_product"}
"""State of torch.optim that is one number per parameter, also where the parameter itself is 0-dim."""


class _Attachment:
    """What the engine remembers of one optimizer."""

    def __init__(self) -> None:
        self.originals: list[list[nn.Parameter]] | None = None  # while exchanged
        self.pieces: list[list[tuple[torch.Tensor, Bucket | None]]] = []  # what they are exchanged for
        self.crossing: set[int] = set()  # pieces (by id) whose gradients are on the other side of the link
        self.bare = False  # state_dict() leaves what is on a disk there
        self.updates: dict[int, Update] = {}  # of this step, by id of the bucket, that take place later
        self.parts: dict[int, Part] = {}  # by id of the bucket, where state has another home than the device
        self.states = 0
        self.counted: set[int] = set()  # pieces whose state is in the ledger


_attached: WeakKeyDictionary[Optimizer, _Attachment] = WeakKeyDictionary()


def attach(optimizer: Optimizer) -> bool:
    """Check an optimizer against the layout of the parameters it holds, and follow it.

    Happens by itself before the first step. Call it earlier to hear of a misfit before any work is done, or
    to load a state dict that an optimizer of a sharded model gave (this rank's pieces).

    Returns:
        Whether the optimizer holds sharded parameters.

    Raises:
        OptimizerError: it cannot step on these pieces (LBFGS, SparseAdam; whole-tensor optimizers
            under ``layout=element``; fused SGD with momentum below fp32).
    """
    if optimizer in _attached:
        return True
    params = [p for g in optimizer.param_groups for p in g["params"]]
    units = [u for p in params if (u := unit_of(p)) is not None]
    if not units:
        return False
    check(optimizer, [b for u in units for b in u.buckets])
    record = _attached[optimizer] = _Attachment()
    for found in {u.upward.in_backward for u in units} - {None}:
        found.optimizers.add(optimizer)
    _slice_existing_state(optimizer)
    optimizer.register_state_dict_pre_hook(lambda o: _exchange(o, record))
    optimizer.register_state_dict_post_hook(lambda o, sd: _take_out(o, record, sd))
    optimizer.register_load_state_dict_pre_hook(lambda o, sd: _exchange(o, record))
    optimizer.register_load_state_dict_post_hook(lambda o: _put_in(o, record))
    return True


def attached_to(engine: Any) -> list[Optimizer]:
    """The attached optimizers that hold parameters of an engine's units, in the order in which they were attached."""
    return [
        optimizer
        for optimizer in _attached
        if any(
            (u := unit_of(p)) is not None and u.upward is engine for g in optimizer.param_groups for p in g["params"]
        )
    ]


def needs_whole_tensors(optimizer: Optimizer) -> bool:
    """Does an update mix elements of a tensor, as far as we know? Unknown classes: yes."""
    return not any(
        c.__name__ in ELEMENTWISE and c.__module__.startswith("torch.optim") for c in type(optimizer).__mro__
    )


def check(optimizer: Optimizer, buckets: Sequence[Bucket]) -> None:
    name = type(optimizer).__name__
    for kind in type(optimizer).__mro__:
        if kind.__name__ in _REFUSED and kind.__module__.startswith("torch.optim"):
            raise OptimizerError(
                f"{name} cannot train a sharded model: {_REFUSED[kind.__name__]}",
                fix="use AdamW, or another first-order optimizer",
            )
    if needs_whole_tensors(optimizer) and any(b.granularity == "element" for b in buckets):
        raise OptimizerError(
            f"{name} is not known to work element by element, and these parameters are cut into slices",
            fix="shard with layout=tensor, for example Strategy('zero2', layout='tensor'): "
            "each parameter then belongs whole to one rank",
        )
    for group in optimizer.param_groups:
        if name == "SGD" and group.get("fused") and group.get("momentum", 0) != 0:
            places = [place for p in group["params"] if (place := _find(p)) is not None]
            low = {bucket.master_dtype for bucket, _ in places} - {torch.float32, torch.float64}
            if low:
                raise OptimizerError(
                    f"fused SGD with momentum is wrong in {', '.join(map(str, low))} (torch 2.13)",
                    fix="pass fused=False",
                )


def _find(param: nn.Parameter) -> tuple[Bucket, int] | None:
    unit = unit_of(param)
    if unit is None:
        return None
    place = unit.places.get(id(param))
    if place is None:
        raise OptimizerError(
            f"the optimizer holds parameter '{param._shardwise_name}' which its unit no longer has",  # type: ignore[attr-defined]
            where=f"unit {unit.label}",
            fix="build the optimizer from model.parameters() again",
        )
    return place


def _exchange(optimizer: Optimizer, record: _Attachment, grads: bool = False) -> None:
    """Parameters out, pieces in."""
    if record.originals is not None:
        _restore(optimizer, record)  # the last step ended in an exception
    _catch_up(optimizer)
    record.originals = [list(g["params"]) for g in optimizer.param_groups]
    record.pieces = []
    for group in optimizer.param_groups:
        pieces: list[tuple[torch.Tensor, Bucket | None]] = []
        record.pieces.append(pieces)
        for p in group["params"]:
            place = _find(p)
            if place is None:
                pieces.append((p, None))
                continue
            bucket, index = place
            held = bucket.piece_params[index]
            if grads:
                found = bucket.grads.for_step(index) if p.requires_grad else None
                for k, piece in enumerate(held):
                    # Gradients on the other side of the link come when it is their turn.
                    piece.grad = None if found is None or bucket.placement.grads_cross else found[k]
                if found is not None and bucket.placement.grads_cross:
                    record.crossing.update(id(piece) for piece in held)
            pieces += [(piece, bucket) for piece in held]
        group["params"] = [piece for piece, _ in pieces]


def _catch_up(optimizer: Optimizer) -> None:
    """Wait for updates that were asked for."""
    for unit in {id(u): u for g in optimizer.param_groups for p in g["params"] if (u := unit_of(p))}.values():
        unit.reconcile()


def _restore(optimizer: Optimizer, record: _Attachment) -> None:
    if record.originals is not None:
        for group, params in zip(optimizer.param_groups, record.originals, strict=True):
            group["params"] = params
        for piece, bucket in (pair for pieces in record.pieces for pair in pieces):
            if bucket is not None:
                piece.grad = None
        record.originals, record.pieces = None, []
        record.crossing.clear()


def _take_out(optimizer: Optimizer, record: _Attachment, state_dict: dict[str, Any]) -> None:
    """The end of ``state_dict()``: what is on a disk comes along as a copy in memory."""
    _restore(optimizer, record)
    if record.bare:
        return
    state: dict[Any, dict[str, Any]] = state_dict["state"]
    for key, values in state.items():
        if any(isinstance(value, SwappedTensor) for value in values.values()):
            state[key] = {k: fetch(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def _put_in(optimizer: Optimizer, record: _Attachment) -> None:
    """The end of ``load_state_dict()``."""
    record.states = -1
    _count_state(optimizer, record)
    _restore(optimizer, record)
    flush(optimizer)


def part(optimizer: Optimizer, bucket: Bucket) -> Part:
    """What an attached optimizer keeps of a bucket."""
    return part_of(_attached[optimizer].parts, optimizer, bucket)


def bare_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` without copies of what is on a disk."""
    record = _attached.get(optimizer)
    if record is None:
        return optimizer.state_dict()
    record.bare = True
    try:
        return optimizer.state_dict()
    finally:
        record.bare = False


def _homes(optimizer: Optimizer) -> dict[int, Bucket]:
    """The buckets of an optimizer's parameters whose state has another home."""
    found = (_find(p) for group in optimizer.param_groups for p in group["params"])
    return {id(place[0]): place[0] for place in found if place is not None and place[0].home is not None}


def flush(optimizer: Optimizer) -> None:
    """State that was put into memory (loaded, or changed inside :func:`optimizer_state`) goes to its home."""
    record = _attached.get(optimizer)
    if record is not None:
        _catch_up(optimizer)
        for bucket in _homes(optimizer).values():
            part_of(record.parts, optimizer, bucket).flush(optimizer.state)


@contextmanager
def optimizer_state(optimizer: Optimizer) -> Iterator[Any]:
    """Have all state of this rank's pieces in memory inside the block, to be read or changed in place.

    For state whose home is a disk; elsewhere it is in memory anyway. Keys are this rank's pieces.

    Yields:
        ``optimizer.state``.

    Cost: the memory of all of this rank's optimizer state; reads it, and writes it back.
    """
    attach(optimizer)
    wait_for_readers(optimizer)
    record = _attached.get(optimizer)
    if record is not None:
        _catch_up(optimizer)
        for bucket in _homes(optimizer).values():
            part_of(record.parts, optimizer, bucket).materialise(optimizer.state)
    try:
        yield optimizer.state
    finally:
        flush(optimizer)


def _slice_existing_state(optimizer: Optimizer) -> None:
    """State that was there before sharding (momenta of a resumed run) is cut like the parameters.

    Raises:
        OptimizerError: it has the shape of a piece: a sharded run's state was loaded into an optimizer that
            was not attached yet, so it sits on the wrong parameters.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            place = _find(p)
            old = optimizer.state.pop(p, None) if place is not None else None
            if not old:
                continue
            assert place is not None
            bucket, index = place
            odd = [k for k, v in old.items() if isinstance(v, torch.Tensor) and v.dim() and v.shape != p.shape]
            if bucket.granularity == "element" and odd:
                raise OptimizerError(
                    f"its state '{odd[0]}' has shape {tuple(old[odd[0]].shape)}, not the parameter's {tuple(p.shape)}",
                    where=f"parameter '{bucket.names[index]}'",
                    fix="call shardwise.attach(optimizer) before optimizer.load_state_dict(...)",
                )
            for piece, (lo, hi) in zip(bucket.piece_params[index], bucket.ranges(index), strict=True):
                optimizer.state[piece] = {
                    k: v.reshape(-1)[lo:hi].to(piece.device, copy=True).view(piece.shape)
                    if isinstance(v, torch.Tensor) and v.shape == p.shape and k not in PER_PARAMETER
                    else (v.clone() if isinstance(v, torch.Tensor) else v)
                    for k, v in old.items()
                }


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    wait_for_readers(optimizer)
    if not attach(optimizer):
        return None
    record = _attached[optimizer]
    if record.originals is not None and _nested(optimizer):
        return None
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is not None:

        def on_parameters() -> Any:  # a closure zeroes and fills p.grad, so it must see parameters
            _restore(optimizer, record)
            result = closure()
            _tell(optimizer)
            _put_pieces(optimizer, record)
            return result

        _exchange(optimizer, record)
        if "closure" in kwargs:
            return args, {**kwargs, "closure": on_parameters}
        return (args[0], on_parameters, *args[2:]), kwargs
    _tell(optimizer)
    _put_pieces(optimizer, record)
    return None


def _nested(optimizer: Optimizer) -> bool:
    """Is this hook called by the step of a base class, inside the step of a class that adds to it?

    Asked of the stack: a mark would be left behind by a step that ends in an exception.
    """
    code, found = type(optimizer).step.__code__, 0
    frame = sys._getframe(1)
    while frame is not None and found < 2:
        found += frame.f_code is code and frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return found > 1


def _put_pieces(optimizer: Optimizer, record: _Attachment) -> None:
    """Pieces in, with gradients; those whose state has another home are stepped here and now."""
    _exchange(optimizer, record, grads=True)
    if any(b is not None and b.home is not None for pieces in record.pieces for _, b in pieces):
        todo = offload.to_update(optimizer, record.pieces, record.parts, record.crossing)
        record.updates = later.plan(optimizer, todo, record.pieces, record.crossing)
        now = [part for part in todo if id(part.bucket) not in record.updates]
        offload.step(optimizer, now, record.pieces, record.crossing)


def _tell(optimizer: Optimizer) -> None:
    """Ranks that have run out of data step the pieces they hold too."""
    join = World.current().join
    if join is not None:
        join.step(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    record = _attached.get(optimizer)
    if record is None or record.originals is None or _nested(optimizer):
        return
    params = [p for ps in record.originals for p in ps]
    _count_state(optimizer, record)
    _restore(optimizer, record)
    touched: dict[int, tuple[Unit, list[Bucket]]] = {}
    for p in params:
        place = _find(p)
        if place is not None and p.grad is not None:
            unit = unit_of(p)
            assert unit is not None
            _, buckets = touched.setdefault(id(unit), (unit, []))
            if place[0] not in buckets:
                buckets.append(place[0])
    join = World.current().join
    with torch.no_grad(), nullcontext() if join is None else join.told_already():
        updates, record.updates = record.updates, {}
        for unit, buckets in sorted(touched.values(), key=lambda t: t[0].index):
            if later.some_wait(optimizer, buckets):  # on all ranks alike, whatever this one holds of the unit
                unit.defer_update([updates[id(b)] for b in buckets if id(b) in updates], buckets)
            else:
                unit.publish(buckets)
        later.start(list(updates.values()))
        for unit, _ in touched.values():
            unit.finish_if_pinned()


def _count_state(optimizer: Optimizer, record: _Attachment) -> None:
    """Tell each model's ledger about optimizer state that is new since the last step."""
    if len(optimizer.state) == record.states:
        return
    record.states = len(optimizer.state)
    assert record.originals is not None
    for p in (p for params in record.originals for p in params):
        place = _find(p)
        if place is None:
            continue
        bucket, index = place
        for piece in bucket.piece_params[index]:
            if id(piece) not in record.counted and piece in optimizer.state:
                record.counted.add(id(piece))
                for value in optimizer.state[piece].values():
                    if isinstance(value, torch.Tensor) and not offload.moves(bucket, value):
                        bucket.ledger.adopt(value, "optimizer")


def put_state(optimizer: Optimizer, bucket: Bucket, piece: torch.Tensor, state: dict[str, Any] | None) -> None:
    """Replace the state of a held piece (``None``: it has none), and tell the ledger.

    Args:
        optimizer: an attached one.
        bucket: whose piece it is.
        piece: one of ``bucket.piece_params``.
    """
    record = _attached[optimizer]
    bucket.settle()
    old = optimizer.state.pop(piece, {})
    if id(piece) in record.counted:
        record.counted.discard(id(piece))
        for value in old.values():
            if isinstance(value, torch.Tensor) and not offload.moves(bucket, value):
                bucket.ledger.drop(value, "optimizer")
    if state is not None:
        optimizer.state[piece] = state
        record.counted.add(id(piece))
        for value in state.values():
            if isinstance(value, torch.Tensor) and not offload.moves(bucket, value):
                bucket.ledger.adopt(value, "optimizer")
    record.states = len(optimizer.state)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
