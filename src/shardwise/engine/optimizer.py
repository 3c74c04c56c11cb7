"""Any torch optimizer, stepping on the pieces this rank holds.

``optimizer.param_groups`` always shows the model's own parameters. For the length of ``step()`` (and of
``state_dict()``, ``load_state_dict()`` and of methods that the optimizer's class adds) they are exchanged for the held
pieces of the master values: 1-D slices, or whole tensors under ``layout=tensor``. The pieces are cut by the world size
alone, so the same kernel runs over the same ranges under every strategy. Hooks on all optimizers
(``register_optimizer_step_pre_hook``) see one before it allocates state, whenever it was built::

    torch's hooked step:  all optimizers' hook: attach · the script's hooks · pieces in · its own step
                          · parameters in, values follow · the script's hooks

A step may call its base's, so hooks are counted. What ends in an exception is mended by the instance's own ``step``.
"""

from __future__ import annotations

import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from types import FunctionType
from typing import Any, cast

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from shardwise import events
from shardwise.comm import World
from shardwise.comm.stats import Op
from shardwise.engine import deferred_update, elementwise, offload
from shardwise.engine.attachment import (
    Attachment,
    attachment_of,
    place_of,
    remember,
    require_attachment,
    units_of,
    unwrapped,
)
from shardwise.engine.bucket import Bucket
from shardwise.engine.elementwise import unhooked
from shardwise.engine.failure import require_valid
from shardwise.engine.joined import publish
from shardwise.engine.offload import OptimizerShard
from shardwise.engine.optimizer_state import (
    count_state,
    cut_existing,
    fetch_offloaded,
    flush,
    guard_state,
    offloaded_shards,
    state_in_memory,
    wait_for_readers,
)
from shardwise.engine.unit import Unit
from shardwise.errors import OptimizerError


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
    optimizer = unwrapped(optimizer)
    if attachment_of(optimizer) is not None:
        return True
    units = units_of(p for g in optimizer.param_groups for p in g["params"])
    if not units:
        return False
    engines = {id(unit.upward): unit.upward for unit in units}.values()
    in_backward = [engine.in_backward for engine in engines if engine.in_backward is not None]
    elementwise.check(optimizer, [b for u in units for b in u.buckets], in_backward=bool(in_backward))
    cut_existing(optimizer)
    guard_state(optimizer)
    record = remember(optimizer)
    for engine in engines:
        engine.remember(optimizer)
    for updates in in_backward:
        updates.optimizers.add(optimizer)
    pre, post = (
        optimizer.register_step_pre_hook(partial(_before_step, record)),
        optimizer.register_step_post_hook(partial(_after_step, record)),
    )
    record.hooks = pre.id, post.id
    optimizer.register_state_dict_pre_hook(lambda o: record.exchange())
    optimizer.register_state_dict_post_hook(lambda o, sd: _state_dict_made(record, sd))
    optimizer.register_load_state_dict_pre_hook(lambda o, sd: _before_load(record))
    optimizer.register_load_state_dict_post_hook(lambda o: _after_load(record))
    _wrap(optimizer, record)
    return True


def optimizer_shard(optimizer: Optimizer, bucket: Bucket) -> OptimizerShard:
    """What an attached optimizer keeps of a bucket."""
    return require_attachment(optimizer).shard_of(bucket)


@contextmanager
def optimizer_state(optimizer: Optimizer) -> Iterator[Any]:
    """Have all state of this rank's pieces in memory inside the block, to be read or changed in place.

    For state whose home is a disk; elsewhere it is in memory anyway. Keys are this rank's pieces.

    Yields:
        ``optimizer.state``.

    Cost: the memory of all of this rank's optimizer state; reads it, and writes it back.
    """
    optimizer = unwrapped(optimizer)
    if attach(optimizer):
        require_valid(require_attachment(optimizer))
    with state_in_memory(optimizer) as state:
        yield state


# --- state dicts -----------------------------------------------------------------------------------------
def _state_dict_made(record: Attachment, state_dict: dict[str, Any]) -> None:
    record.restore()
    if not record.bare:
        fetch_offloaded(state_dict)


def _before_load(record: Attachment) -> None:
    record.exchange(loading=True)


def _after_load(record: Attachment) -> None:
    guard_state(record.optimizer)
    record.counted_entries = -1
    count_state(record.optimizer, record)
    record.restore()
    record.failure = None  # all of its state has been replaced
    flush(record.optimizer)


# --- calls of the instance -------------------------------------------------------------------------------
def _wrap(optimizer: Optimizer, record: Attachment) -> None:
    """Put a ``step`` of its own into the instance, and the methods that its class adds to torch's.

    A ``step`` that a scheduler put there before goes on to be called, and its marks stay visible.
    """
    own: Callable[..., Any] | None = vars(optimizer).get("step")
    shown: Callable[..., Any] = type(optimizer).step if own is None else own

    @wraps(shown)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if record.calls == 0 and record.depth.value:  # the first step of all, which nobody mended
            record.look()
            record.depth.value = 0
        depth, record.calls = record.depth.value, record.calls + 1
        try:
            return own(*args, **kwargs) if own is not None else type(self).step(self, *args, **kwargs)
        except BaseException as error:
            if record.calls == 1:
                events.failing(error)
                record.interrupted(error)
            raise
        finally:
            record.depth.value, record.calls = depth, record.calls - 1

    optimizer.step = _bind(optimizer, step)  # type: ignore[method-assign]
    for name in _added_methods(optimizer):
        setattr(optimizer, name, _bind(optimizer, _method(name, getattr(type(optimizer), name), record)))


def _bind(optimizer: Optimizer, function: Callable[..., Any]) -> Any:
    """As a bound method, but the optimizer that has it as an attribute is still freed as soon as it is dropped.

    Torch's schedulers ask for ``optimizer.step.__func__``.
    """
    me, name = weakref.ref(optimizer), type(optimizer).__name__

    @wraps(function)
    def bound(*args: Any, **kwargs: Any) -> Any:
        found = me()
        if found is None:
            raise OptimizerError(f"this {name} is gone", fix="keep the optimizer, not a method of it")
        return function(found, *args, **kwargs)

    bound.__func__ = function  # type: ignore[attr-defined]
    return bound


def _added_methods(optimizer: Optimizer) -> list[str]:
    """Public methods of the class that torch's base does not know: schedule-free's ``train`` and ``eval``."""
    kind = type(optimizer)
    return [
        name
        for name in dir(kind)
        if not name.startswith("_")
        and not hasattr(Optimizer, name)
        and name not in vars(optimizer)
        and isinstance(inspect.getattr_static(kind, name), FunctionType)
    ]


def _method(name: str, function: Any, record: Attachment) -> Any:
    @wraps(function)
    def method(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if record.depth.value:  # inside a step, or another method
            return function(self, *args, **kwargs)
        with _on_pieces(record, name):
            return function(self, *args, **kwargs)

    return method


@contextmanager
def _on_pieces(record: Attachment, name: str) -> Iterator[None]:
    """A method that is not ``step`` runs on pieces, gradients and state, all of them in memory; then values follow."""
    optimizer, join = record.optimizer, World.current().join
    if join is not None:
        join.allow(Op(f"{name}()", type(optimizer).__name__, 0))
    _refuse_in_autograd(optimizer, f"{name}()")
    with ExitStack() as stack:
        try:
            record.exchange(grads=True)
            _bring_remote_grads(record)
            stack.enter_context(state_in_memory(optimizer))
            for shard in offloaded_shards(record):
                stack.enter_context(shard.bucket.master_here(write=True))
            record.begin_update()
            with record.depth.nested():
                yield
            record.end_update()
        except BaseException as error:
            record.interrupted(error)
            raise
        count_state(optimizer, record)
        record.restore()
    with torch.no_grad():
        publish(_by_unit(record.buckets, record.units))


def _bring_remote_grads(record: Attachment) -> None:
    for p in record.params:
        place = place_of(p)
        if place is not None and place[0].placement.grads_cross:
            bucket, index = place
            held = bucket.piece_params[index]
            if any(id(piece) in record.remote for piece in held):
                for piece, grad in zip(held, bucket.grads.pieces(index), strict=True):
                    piece.grad = grad.to(piece.device)


def _by_unit(buckets: list[Bucket], units: list[Unit]) -> list[tuple[Unit, list[Bucket]]]:
    return [(unit, mine) for unit in units if (mine := [b for b in unit.buckets if b in buckets])]


def _refuse_in_autograd(optimizer: Optimizer, what: str) -> None:
    """A hook of autograd sees gradients of this rank, or none yet."""
    if torch._C._current_graph_task_id() != -1:
        raise OptimizerError(
            f"{what} of {type(optimizer).__name__} was called while a backward runs, where gradients of sharded "
            "parameters are not reduced yet",
            fix="shard with optimizer_in_backward=True, for example Strategy('zero3', optimizer_in_backward=True), "
            "and step after the backward: each unit is updated as soon as its gradients are reduced",
        )


# --- a step ----------------------------------------------------------------------------------------------
def _see(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """The hook before any optimizer's step. Those of the script see parameters, so ours come next to the step."""
    if not attach(optimizer):
        wait_for_readers(optimizer)
        return
    guard_state(optimizer)
    pre, post = require_attachment(optimizer).hooks
    cast("OrderedDict[int, Any]", optimizer._optimizer_step_pre_hooks).move_to_end(pre)
    cast("OrderedDict[int, Any]", optimizer._optimizer_step_post_hooks).move_to_end(post, last=False)


def _before_step(record: Attachment, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    depth = record.depth
    if depth.value >= _levels(optimizer):  # no step of this class goes as deep: an earlier one ended in an exception
        record.look()
        depth.value = 0
    depth.value += 1
    if depth.value > 1:
        return None
    try:
        return _begin_step(record, optimizer, args, kwargs)
    except BaseException as error:
        record.interrupted(error)
        depth.value = 0
        raise


def _begin_step(record: Attachment, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
    """Outside of any other step of this optimizer."""
    _refuse_in_autograd(optimizer, "step()")
    require_valid(record)
    if events.listeners:
        events.phase("step", type(optimizer).__name__)
    wait_for_readers(optimizer)
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _tell_followers(optimizer)
        _pieces_in(optimizer, record)
        return None

    def on_parameters() -> Any:  # a closure zeroes and fills p.grad, so it must see parameters
        record.end_update()
        record.restore()
        result = closure()
        _tell_followers(optimizer)
        _pieces_in(optimizer, record)
        return result

    record.exchange()
    if "closure" in kwargs:
        return args, {**kwargs, "closure": on_parameters}
    return (args[0], on_parameters, *args[2:]), kwargs


def _levels(optimizer: Optimizer) -> int:
    """How many hooked steps one call can go through."""
    steps = [vars(kind)["step"] for kind in type(optimizer).__mro__ if "step" in vars(kind)]
    return sum(unhooked(step) is not step for step in steps)


def _pieces_in(optimizer: Optimizer, record: Attachment) -> None:
    """Pieces in, with gradients; those whose state has another home are stepped here and now, or later."""
    record.exchange(grads=True)
    if record.known.with_home:
        todo = offload.shards_to_update(record.pieces, record.remote, record.shard_of)
        record.deferred = deferred_update.defer(optimizer, todo, record.pieces, record.remote)
        later = set() if record.deferred is None else record.deferred.updates.keys()
        at_once = [s for s in todo if id(s.bucket) not in later]
        deferred_update.let_finish(at_once)
        offload.step(optimizer, at_once, record.pieces, record.remote)
    record.begin_update()


def _tell_followers(optimizer: Optimizer) -> None:
    """Ranks that have run out of data step the pieces they hold too."""
    join = World.current().join
    if join is not None:
        join.step(optimizer)


def _after_step(record: Attachment, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    record.depth.value -= 1
    if record.depth.value > 0:
        return
    record.end_update()
    count_state(optimizer, record)
    record.restore()
    record.steps += 1
    known = record.known
    stepped = known.changes if record.all_given or not known.moving else known.with_gradients()
    step, record.deferred = record.deferred, None
    updates = {} if step is None else step.updates
    join = World.current().join
    changed = stepped
    with torch.no_grad(), nullcontext() if join is None else join.told_already():
        if known.with_home:
            changed = []
            for unit, buckets in stepped:  # on all ranks alike, whatever this one holds
                if deferred_update.some_deferred(optimizer, buckets):
                    unit.defer_update([updates[id(b)] for b in buckets if id(b) in updates], buckets)
                else:
                    changed.append((unit, buckets))
        publish(changed)
        if step is not None:
            step.start()
        for unit in known.moving if known.with_home else ():
            unit.finish_if_pinned()
        if elementwise.is_time(record.steps) and elementwise.compares(optimizer, record.buckets):
            try:
                elementwise.compare(optimizer, record.buckets)
            except OptimizerError as error:
                record.fail(error)
                raise
    if events.listeners:
        events.phase("", "")


register_optimizer_step_pre_hook(_see)
