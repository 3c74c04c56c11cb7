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

from shardwise.engine.commands import Command
from shardwise.engine.flat import FlatParameters
from shardwise.engine.gradients import Gradients, GradState
from shardwise.errors import GradientError
from shardwise.trees import leaves, map_tensors

aten = torch.ops.aten


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
    def local(self) -> list[torch.Tensor]:
        """This rank's pieces, 1-D (whole-shaped under ``layout=tensor``)."""
        return self.grads.pieces(self.slot)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        name = self.bucket.layout.slots[self.slot].name
        if self.grads.states[self.slot] is GradState.SPENT:
            return f"ShardedGrad({name}, shape={tuple(self.shape)}, used up by an update in the backward)"
        return f"ShardedGrad({name}, shape={tuple(self.shape)}, local={sum(t.numel() for t in self.local)} elements)"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        rule = _RULES.get(func)
        whole = [a for a in leaves(args) if isinstance(a, ShardedGrad) and not a.bucket.placement.split_state]
        if whole and (rule is None or func in _LOOKS):
            for handle in whole:
                handle.grads.require_reduced(handle.slot)
            plain = map_tensors((args, kwargs or {}), _unwrapped)
            return func(*plain[0], **plain[1])
        if rule is None:
            grad = next((a for a in args if isinstance(a, ShardedGrad)), None)
            raise GradientError(
                f"'{func.__name__}' has no right answer on a gradient that is split over the ranks",
                where=f"gradient of '{grad.bucket.layout.slots[grad.slot].name}'" if grad is not None else "",
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


def _unwrapped(t: torch.Tensor) -> torch.Tensor:
    return t.grads.whole(t.slot) if isinstance(t, ShardedGrad) and not t.bucket.placement.split_state else t


def _local(grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    out: list[torch.Tensor] = []
    for g in grads:
        if isinstance(g, ShardedGrad):
            g.grads.require_reduced(g.slot)
            out += g.local
        else:
            out.append(g)
    return out


def _beside(pieces: Sequence[torch.Tensor], args: Any) -> Any:
    """The other operands where the pieces are, which may be the host."""
    return map_tensors(args, lambda t: t.to(pieces[0].device)) if pieces else args


def _each(inplace: Callable[..., Any]) -> Callable[..., Any]:
    def one(grad: ShardedGrad, *args: Any, **kwargs: Any) -> ShardedGrad:
        pieces = _local([grad])
        args = _beside(pieces, args)
        for piece in pieces:
            inplace(piece, *args, **kwargs)
        return grad

    return one


def _many(inplace: Callable[..., Any]) -> Callable[..., None]:
    def all_(grads: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> None:
        pieces = _local(grads)
        if pieces:
            inplace(pieces, *_beside(pieces, args), **kwargs)

    return all_


def _zero(grad: ShardedGrad) -> ShardedGrad:
    grad.grads.zero(grad.slot)
    return grad


def _zero_all(grads: Sequence[torch.Tensor]) -> None:
    for g in grads:
        if isinstance(g, ShardedGrad):
            _zero(g)
        else:
            g.zero_()


def _vector_norm(
    grad: ShardedGrad, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> torch.Tensor:
    from shardwise.engine.clip import norms_of

    if dim is not None or keepdim or dtype is not None:
        raise GradientError("a norm along dims has no rank-local answer", fix="use shardwise.clip_grad_norm_")
    return norms_of([grad], float(ord))[0]


def _foreach_norm(grads: Sequence[torch.Tensor], ord: float = 2, dtype: Any = None) -> list[torch.Tensor]:
    from shardwise.engine.clip import norms_of

    return norms_of(grads, float(ord))


def _unscale(grads: Sequence[torch.Tensor], found_inf: torch.Tensor, inv_scale: torch.Tensor) -> None:
    """GradScaler's check: every rank must see an overflow that any rank's pieces have."""
    pieces = _local(grads)
    if pieces:
        found, inverse = _beside(pieces, (found_inf, inv_scale))
        torch._amp_foreach_non_finite_check_and_unscale_(pieces, found, inverse)
        found_inf.copy_(found)
    first = next(g for g in grads if isinstance(g, ShardedGrad))
    mesh = first.bucket.mesh
    votes = torch.zeros(mesh.shard.size, dtype=torch.float32, device=found_inf.device)
    votes[mesh.shard.rank] = found_inf
    mesh.shard.all_gather(votes, first.bucket.op("norm")).wait()
    found_inf.copy_(votes.max())


_RULES: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda grad: grad,
    aten.mul_.Tensor: _each(torch.Tensor.mul_),
    aten.mul_.Scalar: _each(torch.Tensor.mul_),
    aten.div_.Tensor: _each(torch.Tensor.div_),
    aten.div_.Scalar: _each(torch.Tensor.div_),
    aten.clamp_.default: _each(torch.Tensor.clamp_),
    aten.nan_to_num_.default: _each(torch.Tensor.nan_to_num_),
    aten.zero_.default: _zero,
    aten._foreach_zero_.default: _zero_all,
    aten._foreach_mul_.Tensor: _many(torch._foreach_mul_),
    aten._foreach_mul_.Scalar: _many(torch._foreach_mul_),
    aten._foreach_div_.Tensor: _many(torch._foreach_div_),
    aten._foreach_div_.Scalar: _many(torch._foreach_div_),
    aten._foreach_clamp_min_.Scalar: _many(torch._foreach_clamp_min_),
    aten._foreach_clamp_max_.Scalar: _many(torch._foreach_clamp_max_),
    aten.linalg_vector_norm.default: _vector_norm,
    aten._foreach_norm.Scalar: _foreach_norm,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
}
_LOOKS = {aten.linalg_vector_norm.default, aten._foreach_norm.Scalar}  # without a collective where all of it is here
BY_NAME = {str(func): rule for func, rule in _RULES.items()}
"""The same rules for ranks that are told about an operation, see :mod:`shardwise.engine.join`."""
