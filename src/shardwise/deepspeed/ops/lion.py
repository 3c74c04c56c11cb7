"""Lion, which torch has not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from shardwise.deepspeed.ops.held import ZeroesAsTold, after, by_dtype, fp32_states_only, listed
from shardwise.engine.elementwise import ELEMENTWISE
from shardwise.errors import OptimizerError


class FusedLion(ZeroesAsTold):
    """Lion: the sign of a momentum (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms").

    Element by element, so it trains under every strategy. Where the momentum is exactly 0 nothing moves, as in the
    paper; DeepSpeed's kernels take a step there.

    Args:
        params: parameters, or groups of them.
        lr: how far each element moves in a step.
        betas: how much of the momentum counts in the update, and how much of it is kept.
        weight_decay: decoupled: parameters shrink by ``lr * weight_decay``.
        set_grad_none: what ``zero_grad()`` does unless it is told.

    Raises:
        OptimizerError: a number that has no meaning.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
    ) -> None:
        if not (float(lr) >= 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise OptimizerError(
                f"lr={lr}, betas={tuple(betas)}, weight_decay={weight_decay}", where=type(self).__name__,
                fix="rates of 0 or more, and betas from 0 to below 1",
            )  # fmt: skip
        self.set_grad_none = set_grad_none
        super().__init__(listed(params), {"lr": lr, "betas": (betas[0], betas[1]), "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = after(closure)
        for group in self.param_groups:
            lr, (beta1, beta2) = float(group["lr"]), group["betas"]
            for params, grads, (momenta,), _ in by_dtype(self, group, ("exp_avg",)):
                updates = torch._foreach_lerp(momenta, grads, 1 - beta1)
                torch._foreach_sign_(updates)
                if group["weight_decay"]:
                    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                torch._foreach_add_(params, updates, alpha=-lr)
                torch._foreach_lerp_(momenta, grads, 1 - beta2)
        return loss


class DeepSpeedCPULion(FusedLion):
    """The same, with the arguments of DeepSpeed's class for state in host memory.

    Args:
        fp32_optimizer_states: must be ``True``: state has the dtype of the master values.

    Raises:
        OptimizerError, ConfigError: a number that has no meaning, or state below fp32.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0,
        fp32_optimizer_states: bool = True,
    ) -> None:
        fp32_states_only("DeepSpeedCPULion", fp32_optimizer_states)
        super().__init__(model_params, lr, betas, weight_decay)


ELEMENTWISE.add(f"{__name__}.{FusedLion.__qualname__}")
