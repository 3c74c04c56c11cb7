"""The gradient that ``p.grad`` shows when the reduced gradient is split over the ranks.

It has the parameter's logical shape and holds this rank's pieces. Operations that have a right answer
give it (norms take one collective; scaling, clamping and zeroing are local); everything else raises,
because a silent rank-local answer is how clipping quietly stops working elsewhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shardwise.engine import norms
from shardwise.engine.commands import Command
from shardwise.engine.flat import FlatParameters
from shardwise.engine.grad_states import GradState
from shardwise.engine.gradients import Gradients
from shardwise.engine.norms import Spread
from shardwise.errors import GradientError
from shardwise.trees import leaves, map_tensors

aten = torch.ops.aten


def spread_of(grads: Gradients, index: int) -> Spread:
    """What this rank holds of the reduced gradient of parameter ``index``.

    Raises:
        GradientError: it has not been reduced yet, or an update has used it up.
    """
    bucket = grads.bucket
    grads.require_reduced(index)
    pieces = grads.pieces(index)
    return Spread(bucket.mesh, bucket.op("norm"), bucket.master_dtype, bucket.device, bucket.held_shards(index), pieces)


class ShardedGrad(torch.Tensor):
    """A handle of logical shape on one parameter's reduced gradient."""

    _grads: weakref.ref[Gradients]
    slot: int

    @staticmethod
    def __new__(cls, grads: Gradients, index: int) -> ShardedGrad:
        bucket = grads.bucket
        slot = bucket.layout.slots[index]
        self = torch.Tensor._make_wrapper_subclass(cls, slot.shape, dtype=bucket.master_dtype, device=bucket.device)
        # By a weak reference: p.grad is kept by C++, where the collector cannot look for cycles.
        self._grads, self.slot = weakref.ref(grads), index
        return self

    def __init__(self, grads: Gradients, index: int) -> None:
        super().__init__()

    @property
    def bucket(self) -> FlatParameters:
        """The flat parameters that it is a gradient of."""
        return self.grads.bucket

    @property
    def grads(self) -> Gradients:
        """The gradients of its bucket."""
        found = self._grads()
        if found is None:
            raise GradientError(
                "the gradient's model is gone", fix="keep the model as long as its gradients are needed"
            )
        return found

    @property
    def is_split(self) -> bool:
        """Does each rank hold a part of it only?"""
        return self.bucket.placement.split_state

    @property
    def waits(self) -> bool:
        """Is it this rank's own, as inside ``no_sync()``: has something arrived here that was not reduced yet?"""
        states = self.grads.states
        return states[self.slot] is GradState.LOCAL or (not self.is_split and states.waits(self.slot))

    @property
    def spread(self) -> Spread:
        return spread_of(self.grads, self.slot)

    @property
    def local(self) -> list[torch.Tensor]:
        """This rank's pieces, 1-D (whole-shaped under ``layout=tensor``)."""
        return self.grads.pieces(self.slot)

    @property
    def _name(self) -> str:
        return self.bucket.layout.slots[self.slot].name

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        if self.grads.states[self.slot] is GradState.SPENT:
            return f"ShardedGrad({self._name}, shape={tuple(self.shape)}, used up by an update in the backward)"
        if self.waits:
            return f"ShardedGrad({self._name}, shape={tuple(self.shape)}, of this rank, not reduced yet)"
        local = sum(t.numel() for t in self.local)
        return f"ShardedGrad({self._name}, shape={tuple(self.shape)}, local={local} elements)"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        rule = _RULES.get(func)
        handles = [a for a in leaves((args, kwargs or {})) if isinstance(a, ShardedGrad)]
        if rule is None and not func._schema.is_mutable and any(h.waits for h in handles):
            plain = map_tensors((args, kwargs or {}), _readable)  # of no_sync(): this rank's own, as DDP shows it
            return func(*plain[0], **plain[1])
        whole = [a for a in leaves(args) if isinstance(a, ShardedGrad) and not a.is_split]
        if whole and (rule is None or func in _LOOKS):
            for handle in whole:
                handle.grads.require_reduced(handle.slot)
                if func._schema.is_mutable:
                    handle.grads.scalings.forget(handle.slot)
            plain = map_tensors((args, kwargs or {}), _unwrapped)
            return func(*plain[0], **plain[1])
        if rule is None:
            grad = next((a for a in leaves(args) if isinstance(a, ShardedGrad)), None)
            raise GradientError(
                f"'{func.__name__}' has no right answer on a gradient that is split over the ranks",
                where=f"gradient of '{grad._name}'" if grad is not None else "",
                fix="use shardwise.clip_grad_norm_ / clip_grad_value_, or read it inside "
                "'with shardwise.gathered(module, grads=True):'",
            )
        kwargs = kwargs or {}
        many = isinstance(args[0], (list, tuple))
        handles = [g for g in (args[0] if many else args[:1]) if isinstance(g, ShardedGrad)]
        join = handles[0].bucket.mesh.world.join if handles else None
        if join is None or func is aten.detach.default:
            return rule(*args, **kwargs)
        places = join.addresses([g.bucket.params[g.slot] for g in handles])
        rest = args[1:]
        with join.event(
            Command.OPERATION, None, str(func), many, places, lambda: map_tensors(rest, torch.Tensor.cpu), kwargs
        ):
            return rule(*args, **kwargs)


def _readable(t: torch.Tensor) -> torch.Tensor:
    return t.grads.unreduced(t.slot) if isinstance(t, ShardedGrad) and t.waits else _unwrapped(t)


def _unwrapped(t: torch.Tensor) -> torch.Tensor:
    return t.grads.whole(t.slot) if isinstance(t, ShardedGrad) and not t.is_split else t


def _spreads(grads: Sequence[torch.Tensor]) -> list[Spread]:
    return [g.spread for g in grads if isinstance(g, ShardedGrad)]


def _places(grads: Sequence[torch.Tensor]) -> dict[torch.device, list[torch.Tensor]]:
    """The held pieces, and plain gradients, by where they are: the home of some may be the host."""
    places: dict[torch.device, list[torch.Tensor]] = {}
    for g in grads:
        for piece in g.spread.pieces if isinstance(g, ShardedGrad) else [g]:
            places.setdefault(piece.device, []).append(piece)
    return places


def _beside(device: torch.device, args: Any) -> Any:
    """The other operands where the pieces are."""
    return map_tensors(args, lambda t: t.to(device))


def _note(grads: Sequence[torch.Tensor], by: Any, divide: bool | None) -> None:
    """Remember by which number gradients were multiplied or divided; ``divide=None``: they were changed otherwise."""
    number = isinstance(by, (int, float)) or (isinstance(by, torch.Tensor) and by.numel() == 1)
    for g in grads:
        if isinstance(g, ShardedGrad):
            if divide is None or not number or isinstance(by, ShardedGrad):
                g.grads.scalings.forget(g.slot)
            else:
                g.grads.scalings.add(g.slot, by if isinstance(by, torch.Tensor) else float(by), divide)


def _each(inplace: Callable[..., Any], divide: bool | None = None) -> Callable[..., Any]:
    def one(grad: ShardedGrad, *args: Any, **kwargs: Any) -> ShardedGrad:
        _note([grad], args[0] if args else None, divide)
        for device, pieces in _places([grad]).items():
            beside = _beside(device, args)
            for piece in pieces:
                inplace(piece, *beside, **kwargs)
        return grad

    return one


def _many(inplace: Callable[..., Any], divide: bool | None = None) -> Callable[..., None]:
    def all_(grads: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> None:
        _note(grads, args[0] if args else None, divide)
        for device, pieces in _places(grads).items():
            inplace(pieces, *_beside(device, args), **kwargs)

    return all_


def _real_only(rule: Callable[..., Any]) -> Callable[..., Any]:
    """All ranks raise, also those that hold nothing of it."""

    def real(grads: Any, *args: Any, **kwargs: Any) -> Any:
        if any(g.is_complex() for g in leaves(grads)):
            raise GradientError("complex gradients cannot be clamped", fix="clip their norm instead")
        return rule(grads, *args, **kwargs)

    return real


def _zero(grad: ShardedGrad) -> ShardedGrad:
    grad.grads.zero(grad.slot)
    return grad


def _zero_all(grads: Sequence[torch.Tensor]) -> None:
    for g in grads:
        if isinstance(g, ShardedGrad):
            _zero(g)
        else:
            g.zero_()


def _norms(grads: Sequence[torch.Tensor], norm_type: float) -> list[torch.Tensor]:
    order = norms.order_of(norm_type)
    found = iter(norms.per_tensor(_spreads(grads), order))
    return [next(found) if isinstance(g, ShardedGrad) else torch.linalg.vector_norm(g, order) for g in grads]


def _vector_norm(
    grad: ShardedGrad, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> torch.Tensor:
    if dim is not None or keepdim or dtype is not None:
        raise GradientError("a norm along dims has no rank-local answer", fix="use shardwise.clip_grad_norm_")
    return _norms([grad], ord)[0]


def _foreach_norm(grads: Sequence[torch.Tensor], ord: float = 2, dtype: Any = None) -> list[torch.Tensor]:
    found = _norms(grads, ord)
    return found if dtype is None else [n.to(dtype.to_real()) for n in found]


def _unscale(grads: Sequence[torch.Tensor], found_inf: torch.Tensor, inv_scale: torch.Tensor) -> None:
    """GradScaler's check: every rank must see an overflow that any rank's pieces have."""
    spreads = _spreads(grads)
    for device, pieces in _places(grads).items():
        found, inverse = found_inf.to(device), inv_scale.to(device)
        real = [torch.view_as_real(p) if p.is_complex() else p for p in pieces]
        torch._amp_foreach_non_finite_check_and_unscale_(real, found, inverse)
        found_inf.copy_(found)
    _note(grads, inv_scale, divide=False)
    norms.agree(found_inf, spreads)


_RULES: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda grad: grad,
    aten.mul_.Tensor: _each(torch.Tensor.mul_, divide=False),
    aten.mul_.Scalar: _each(torch.Tensor.mul_, divide=False),
    aten.div_.Tensor: _each(torch.Tensor.div_, divide=True),
    aten.div_.Scalar: _each(torch.Tensor.div_, divide=True),
    aten.clamp_.default: _real_only(_each(torch.Tensor.clamp_)),
    aten.nan_to_num_.default: _each(torch.Tensor.nan_to_num_),
    aten.zero_.default: _zero,
    aten._foreach_zero_.default: _zero_all,
    aten._foreach_mul_.Tensor: _many(torch._foreach_mul_, divide=False),
    aten._foreach_mul_.Scalar: _many(torch._foreach_mul_, divide=False),
    aten._foreach_div_.Tensor: _many(torch._foreach_div_, divide=True),
    aten._foreach_div_.Scalar: _many(torch._foreach_div_, divide=True),
    aten._foreach_clamp_min_.Scalar: _real_only(_many(torch._foreach_clamp_min_)),
    aten._foreach_clamp_max_.Scalar: _real_only(_many(torch._foreach_clamp_max_)),
    aten.linalg_vector_norm.default: _vector_norm,
    aten._foreach_norm.Scalar: _foreach_norm,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
}
_LOOKS = {aten.linalg_vector_norm.default, aten._foreach_norm.Scalar}  # without a collective where all of it is here
BY_NAME = {str(func): rule for func, rule in _RULES.items()}
"""The same rules for ranks that are told about an operation, see :mod:`shardwise.engine.join`."""
