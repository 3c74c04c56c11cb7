"""Optimizer state outside of steps: read, replaced, cut, counted, and kept from those who look for it in vain."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch.optim import Optimizer

from shardwise.engine.attachment import Attachment, attachment_of, place_of, require_attachment, unit_of, unwrapped
from shardwise.engine.bucket import Bucket
from shardwise.engine.offload import OptimizerShard, is_offloaded
from shardwise.errors import OptimizerError
from shardwise.tiers.swapped_tensor import fetch, is_swapped

PER_PARAMETER = {"step", "eta", "mu", "mu_product"}
"""State of torch.optim that is one number per parameter, also where the parameter itself is 0-dim."""


class StateByPiece(defaultdict[Any, dict[str, Any]]):
    """``optimizer.state`` of an attached optimizer. Its keys are pieces: to ask for a sharded parameter's is an error.

    Torch's own would answer with an empty dict, and remember it.
    """

    def __missing__(self, key: Any) -> dict[str, Any]:
        _refuse_parameter(key)
        value: dict[str, Any] = {}
        self[key] = value
        return value

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or _refuse_parameter(key)

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(key, default) if key in self else default

    def __setitem__(self, key: Any, value: dict[str, Any]) -> None:
        _refuse_parameter(key)
        super().__setitem__(key, value)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise _not_copied("copied")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise _not_copied("pickled")


def _refuse_parameter(key: object) -> bool:
    unit = unit_of(key)
    if unit is not None and not unit.places[id(key)][0].placement.settled:
        raise OptimizerError(
            "optimizer.state has no entry for a sharded parameter: its keys are the pieces that this rank holds",
            where=f"parameter '{key._shardwise_name}'",  # type: ignore[attr-defined]
            fix="'with shardwise.optimizer_state(optimizer) as state:' for this rank's pieces, optimizer.state_dict(), "
            "or shardwise.checkpoint for what does not depend on the ranks",
        )
    return False


def _not_copied(how: str) -> OptimizerError:
    return OptimizerError(
        f"an optimizer of a sharded model cannot be {how}: its state belongs to pieces that this rank holds",
        fix="build a new optimizer and give it the state: new.load_state_dict(old.state_dict()) after "
        "shardwise.attach(new), or use shardwise.checkpoint",
    )


def guard_state(optimizer: Optimizer) -> None:
    """Let ``optimizer.state`` refuse parameters. Loading a state dict puts an ordinary one in its place."""
    if type(optimizer.state) in (dict, defaultdict):
        optimizer.state = StateByPiece(None, optimizer.state)


# --- those who still read it -----------------------------------------------------------------------------
# A save in the background copies optimizer state after it has returned, beside the next forward and backward. Nothing
# but an update changes that state, so updates ask here first.
_READERS = "_shardwise_readers"  # an attribute of the optimizer


def add_reader(optimizer: Optimizer, wait: Callable[[], object]) -> None:
    """From now on, whoever wants to change the optimizer's state calls ``wait`` first.

    Args:
        wait: returns when the state may change, however the reading ended. Called by the thread that updates, until it
            has returned once.
    """
    vars(unwrapped(optimizer)).setdefault(_READERS, []).append(wait)


def wait_for_readers(optimizer: Optimizer) -> None:
    """Before state is changed in place: wait for those who still read it. A look into a dict, if there is nobody."""
    for wait in vars(optimizer).get(_READERS, ()):
        wait()
    vars(optimizer).pop(_READERS, None)


# --- in memory -------------------------------------------------------------------------------------------
def offloaded_shards(record: Attachment) -> list[OptimizerShard]:
    """The optimizer shards whose state may have another home."""
    return [record.shard_of(bucket) for bucket in record.buckets if bucket.home is not None]


def flush(optimizer: Optimizer) -> None:
    """State that was put into memory (loaded, or changed inside ``optimizer_state``) goes to its home."""
    record = attachment_of(optimizer)
    if record is not None:
        for unit in record.units:
            if unit.failure is None:
                unit.reconcile()
        for shard in offloaded_shards(record):
            shard.flush(optimizer.state)


@contextmanager
def state_in_memory(optimizer: Optimizer) -> Iterator[Any]:
    """Have all state of this rank's pieces in memory inside the block. See :func:`shardwise.optimizer_state`."""
    wait_for_readers(optimizer)
    record = attachment_of(optimizer)
    if record is not None:
        record.finish_updates()
        for shard in offloaded_shards(record):
            shard.materialise(optimizer.state)
    try:
        yield optimizer.state
    finally:
        flush(optimizer)


# --- state dicts -----------------------------------------------------------------------------------------
def bare_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """``optimizer.state_dict()`` without copies of what is on a disk."""
    record = attachment_of(optimizer)
    if record is None:
        return optimizer.state_dict()
    record.bare = True
    try:
        return optimizer.state_dict()
    finally:
        record.bare = False


def fetch_offloaded(state_dict: dict[str, Any]) -> None:
    """What is on a disk comes along in a state dict as a copy in memory."""
    state: dict[Any, dict[str, Any]] = state_dict["state"]
    for key, values in state.items():
        if any(is_swapped(value) for value in values.values()):
            state[key] = {k: fetch(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}


# --- from before sharding --------------------------------------------------------------------------------
def cut_existing(optimizer: Optimizer) -> None:
    """State that was there before sharding (momenta of a resumed run) is cut like the parameters.

    Raises:
        OptimizerError: it has the shape of a piece: a sharded run's state was loaded into an optimizer that
            was not attached yet, so it sits on the wrong parameters.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            place = place_of(p)
            old = optimizer.state.pop(p, None) if place is not None else None
            if not old:
                continue
            assert place is not None
            bucket, index = place
            odd = [k for k, v in old.items() if isinstance(v, torch.Tensor) and v.dim() and v.shape != p.shape]
            if not bucket.whole_tensors and odd:
                raise OptimizerError(
                    f"its state '{odd[0]}' has shape {tuple(old[odd[0]].shape)}, not the parameter's {tuple(p.shape)}",
                    where=f"parameter '{bucket.names[index]}'",
                    fix="call shardwise.attach(optimizer) before optimizer.load_state_dict(...)",
                )
            for piece, values in cut(place, p, old):
                assert values is not None
                optimizer.state[piece] = values


def cut(
    place: tuple[Bucket, int], p: torch.Tensor, state: Mapping[str, Any] | None
) -> list[tuple[torch.Tensor, dict[str, Any] | None]]:
    """What an optimizer keeps for a whole parameter, for each piece that this rank holds; ``None``: nothing."""
    bucket, index = place
    out: list[tuple[torch.Tensor, dict[str, Any] | None]] = []
    for piece, (lo, hi) in zip(bucket.piece_params[index], bucket.ranges(index), strict=True):
        mine = (
            None
            if state is None
            else {
                k: v.reshape(-1)[lo:hi].to(piece.device, copy=True).view(piece.shape)
                if isinstance(v, torch.Tensor) and v.shape == p.shape and k not in PER_PARAMETER
                else (v.clone() if isinstance(v, torch.Tensor) else v)
                for k, v in state.items()
            }
        )
        out.append((piece, mine))
    return out


# --- the ledger ------------------------------------------------------------------------------------------
def count_state(optimizer: Optimizer, record: Attachment) -> None:
    """Tell each model's ledger about optimizer state that is new since the last step."""
    if len(optimizer.state) == record.counted_entries:
        return
    record.counted_entries = len(optimizer.state)
    for p in record.params:
        place = place_of(p)
        if place is None:
            continue
        bucket, index = place
        for piece in bucket.piece_params[index]:
            if id(piece) not in record.counted and piece in optimizer.state:
                record.counted.add(id(piece))
                for value in _in_memory(bucket, optimizer.state[piece]):
                    bucket.ledger.adopt(value, "optimizer")


def put_state(optimizer: Optimizer, bucket: Bucket, piece: torch.Tensor, state: dict[str, Any] | None) -> None:
    """Replace the state of a held piece (``None``: it has none), and tell the ledger.

    Args:
        optimizer: an attached one.
        bucket: whose piece it is.
        piece: one of ``bucket.piece_params``.
    """
    record = require_attachment(optimizer)
    bucket.reconcile()
    old = optimizer.state.pop(piece, {})
    if id(piece) in record.counted:
        record.counted.discard(id(piece))
        for value in _in_memory(bucket, old):
            bucket.ledger.drop(value, "optimizer")
    if state is not None:
        optimizer.state[piece] = state
        record.counted.add(id(piece))
        for value in _in_memory(bucket, state):
            bucket.ledger.adopt(value, "optimizer")
    record.counted_entries = len(optimizer.state)


def _in_memory(bucket: Bucket, state: dict[str, Any]) -> list[torch.Tensor]:
    return [v for v in state.values() if isinstance(v, torch.Tensor) and not is_offloaded(bucket, v)]
