"""DeepSpeed's Adam, on torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Adam

from shardwise.deepspeed.ops.held import (
    ZeroesAsTold,
    after,
    by_dtype,
    can_fuse,
    fp32_states_only,
    listed,
    no_amsgrad,
)
from shardwise.engine.elementwise import ELEMENTWISE
from shardwise.errors import OptimizerError


class FusedAdam(ZeroesAsTold, Adam):
    """Adam (Kingma and Ba 2014), with decoupled weight decay (Loshchilov and Hutter 2017) unless it is told not to.

    ``torch.optim.Adam`` does it, in one kernel where the parameters are on a device that has one.

    Args:
        params: parameters, or groups of them.
        lr, betas, eps, weight_decay: as in torch.
        bias_correction: ``False``: first and second moments are used as they are, small in the first steps.
        adam_w_mode: weight decay shrinks parameters; ``False``: it is added to gradients.
        amsgrad: must be ``False``.
        set_grad_none: what ``zero_grad()`` does unless it is told.

    Raises:
        OptimizerError: AMSGrad; a group with another ``bias_correction``.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> FusedAdam:
        """Without the correction the step is our own: torch's has no such argument."""
        corrected = args[2] if len(args) > 2 else kwargs.get("bias_correction", True)
        return super().__new__(cls if corrected else _UNCORRECTED.get(cls, cls))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        no_amsgrad("FusedAdam", amsgrad)
        params = listed(params)
        self._corrected, self.adam_w_mode, self.set_grad_none = bias_correction, bool(adam_w_mode), set_grad_none
        super().__init__(
            params,
            lr=lr,
            betas=(betas[0], betas[1]),
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=bool(adam_w_mode),
            fused=True if bias_correction and can_fuse(params) else None,
        )
        self.defaults["bias_correction"] = bias_correction
        for group in self.param_groups:
            group.setdefault("bias_correction", bias_correction)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if param_group.get("bias_correction", self._corrected) != self._corrected:
            raise OptimizerError("one optimizer corrects all of its groups, or none", fix="use two optimizers")
        super().add_param_group(param_group)


class _UncorrectedAdam(FusedAdam):
    """The same without bias correction."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = after(closure)
        for group in self.param_groups:
            lr, decay, (beta1, beta2) = float(group["lr"]), group["weight_decay"], group["betas"]
            for params, grads, (firsts, seconds), states in by_dtype(self, group, ("exp_avg", "exp_avg_sq")):
                for state in states:
                    state["step"] = state.get("step", torch.zeros(())) + 1
                if decay and self.adam_w_mode:
                    torch._foreach_mul_(params, 1 - lr * decay)
                elif decay:
                    grads = list(torch._foreach_add(grads, params, alpha=decay))
                torch._foreach_lerp_(firsts, grads, 1 - beta1)
                torch._foreach_mul_(seconds, beta2)
                torch._foreach_addcmul_(seconds, grads, grads, value=1 - beta2)
                roots = torch._foreach_sqrt(seconds)
                torch._foreach_add_(roots, group["eps"])
                torch._foreach_addcdiv_(params, firsts, roots, value=-lr)
        return loss


class DeepSpeedCPUAdam(FusedAdam):
    """The same as :class:`FusedAdam`, with the arguments of DeepSpeed's class for state in host memory.

    Where state is and where updates run is the strategy's affair (``offload_optimizer``), not the class's.

    Args:
        model_params: parameters, or groups of them.
        adamw_mode: weight decay shrinks parameters; ``False``: it is added to gradients.
        fp32_optimizer_states: must be ``True``: state has the dtype of the master values.

    Raises:
        OptimizerError, ConfigError: AMSGrad, or state below fp32.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        adamw_mode: bool = True,
        fp32_optimizer_states: bool = True,
    ) -> None:
        no_amsgrad("DeepSpeedCPUAdam", amsgrad)
        fp32_states_only("DeepSpeedCPUAdam", fp32_optimizer_states)
        super().__init__(model_params, lr, bias_correction, betas, eps, adamw_mode, weight_decay)


class _UncorrectedCPUAdam(_UncorrectedAdam, DeepSpeedCPUAdam):
    """The same without bias correction. Its own step is first: torch puts hooked ones into any class it makes."""


_UNCORRECTED: dict[type, type] = {FusedAdam: _UncorrectedAdam, DeepSpeedCPUAdam: _UncorrectedCPUAdam}
ELEMENTWISE.add(f"{__name__}.{_UncorrectedAdam.__qualname__}")
