"""LAMB, which torch has not."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from shardwise.deepspeed.ops.held import after, by_dtype, listed, no_amsgrad
from shardwise.errors import ConfigError, OptimizerError


class FusedLamb(Optimizer):
    """LAMB (You et al. 2019, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes").

    Adam's update of each parameter, made as long as the parameter itself times the rate. It needs whole parameters:
    shard with ``layout=tensor``.

    Args:
        params: parameters, or groups of them.
        lr, betas, eps: as in Adam.
        bias_correction: correct moments in the first steps.
        eps_inside_sqrt: add ``eps`` to the second moment, not to its root.
        weight_decay: added to the update before its length is taken.
        max_grad_norm: must be 0: the engine clips.
        max_coeff, min_coeff: limits of a parameter's length divided by its update's.
        amsgrad: must be ``False``.

    Raises:
        OptimizerError, ConfigError: AMSGrad, clipping, or a number that has no meaning.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        no_amsgrad("FusedLamb", amsgrad)
        if max_grad_norm:
            raise ConfigError("FusedLamb does not clip", fix="gradient_clipping of the configuration")
        if not (float(lr) >= 0 and eps >= 0 and all(0 <= beta < 1 for beta in betas) and 0 <= min_coeff <= max_coeff):
            raise OptimizerError(
                f"lr={lr}, betas={tuple(betas)}, eps={eps}, coefficients from {min_coeff} to {max_coeff}",
                where="FusedLamb",
                fix="rates of 0 or more, and betas from 0 to below 1",
            )
        self.eps_inside_sqrt = eps_inside_sqrt
        self.lamb_coeffs: list[torch.Tensor] = []
        super().__init__(
            listed(params),
            {
                "lr": lr,
                "bias_correction": bias_correction,
                "betas": (betas[0], betas[1]),
                "eps": eps,
                "weight_decay": weight_decay,
                "max_coeff": max_coeff,
                "min_coeff": min_coeff,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = after(closure)
        self.lamb_coeffs = []
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for params, grads, (firsts, seconds), states in by_dtype(self, group, ("exp_avg", "exp_avg_sq")):
                torch._foreach_lerp_(firsts, grads, 1 - beta1)
                torch._foreach_mul_(seconds, beta2)
                torch._foreach_addcmul_(seconds, grads, grads, value=1 - beta2)
                if self.eps_inside_sqrt:
                    roots = torch._foreach_add(seconds, group["eps"])
                    torch._foreach_sqrt_(roots)
                else:
                    roots = torch._foreach_sqrt(seconds)
                    torch._foreach_add_(roots, group["eps"])
                updates = torch._foreach_div(firsts, roots)
                if group["weight_decay"]:
                    torch._foreach_add_(updates, params, alpha=group["weight_decay"])
                lengths = torch.stack(torch._foreach_norm(params))
                others = torch.stack(torch._foreach_norm(updates))
                ratios = (lengths / others).clamp(group["min_coeff"], group["max_coeff"])
                ratios = torch.where((lengths != 0) & (others != 0), ratios, torch.ones_like(ratios))
                rates = [-_rate(group, state) for state in states]
                self.lamb_coeffs += ratios.unbind()
                scales = ratios * torch.tensor(rates, dtype=ratios.dtype, device=ratios.device)
                torch._foreach_mul_(updates, list(scales.unbind()))
                torch._foreach_add_(params, updates)
        return loss

    def get_lamb_coeffs(self) -> list[float]:
        """Of the last step, the length of each parameter divided by its update's, within its limits."""
        return [float(ratio) for ratio in self.lamb_coeffs]


def _rate(group: dict[str, Any], state: dict[str, Any]) -> float:
    """The rate of this step, which is counted."""
    state["step"] = state.get("step", torch.zeros(())) + 1
    lr, step, (beta1, beta2) = float(group["lr"]), float(state["step"]), group["betas"]
    if not group["bias_correction"]:
        return lr
    return float(lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step))
