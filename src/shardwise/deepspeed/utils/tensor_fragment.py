"""Master values, gradients and optimizer state of a parameter, whatever is split and wherever it is.

All functions work under every strategy and home. Those of ``full`` are collectives: every rank calls them, with the
same value. A *local* part is what this rank holds of a parameter, ``(n,)``, in the order of its elements; parts need
not be equally long, and may be empty. ``get`` functions give tensors of their own. Values of frozen parameters are read
with ``GatheredParameters``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from shardwise.engine import one_parameter, one_state
from shardwise.engine.sharded_grad import ShardedGrad
from shardwise.engine.unit import unit_of


def safe_get_full_fp32_param(param: nn.Parameter) -> torch.Tensor | None:
    """The master values, in fp32; ``None`` for a frozen parameter, or one of no sharded model."""
    trains = unit_of(param) is not None and param.requires_grad
    return one_parameter.full_values(param).float() if trains else None


def safe_set_full_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """Replace the master values. What is computed with follows.

    Raises:
        ArgumentError: another shape, or a parameter of no sharded model.
    """
    one_parameter.set_full_values(param, value)


def safe_get_full_grad(param: nn.Parameter) -> torch.Tensor | None:
    """The reduced gradient, in the master dtype; ``None`` if there is none.

    Where a whole gradient waits on this rank, inside of ``no_sync`` or before the end of a window under stages 0 and
    1: this rank's own sum so far.

    Raises:
        GradientError: a split one was not reduced yet (``no_sync``), or an update in the backward has used it up.
    """
    grad = param.grad
    if unit_of(param) is None or (isinstance(grad, ShardedGrad) and grad.waits):
        return None if grad is None else grad.detach().clone()
    return one_parameter.full_grad(param)


def safe_set_full_grad(param: nn.Parameter, value: torch.Tensor) -> None:
    """Replace the reduced gradient, which the next step takes."""
    one_parameter.set_full_grad(param, value)


def safe_update_full_grad_vectorized(
    param_list: Sequence[nn.Parameter], update_func: Callable[[torch.Tensor, nn.Parameter], torch.Tensor]
) -> None:
    """Replace the gradients of several parameters by ``update_func(gradient, parameter)``, where there are some."""
    params = [p for p in param_list if p.requires_grad and unit_of(p) is not None]
    for p, grad in zip(params, one_parameter.full_grads(params), strict=True):
        if grad is not None:
            one_parameter.set_full_grad(p, update_func(grad, p))


def safe_get_full_optimizer_state(param: nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """What the optimizer keeps under a key such as ``exp_avg``; ``None`` if nothing, as before the first step."""
    return None if unit_of(param) is None else one_state.full_state(param, optim_state_key)


def safe_set_full_optimizer_state(param: nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    """Replace what the optimizer keeps under a key.

    Raises:
        OptimizerError: it keeps nothing there.
    """
    one_state.set_full_state(param, optim_state_key, value)


def safe_get_local_fp32_param(param: nn.Parameter) -> torch.Tensor | None:
    """This rank's part of the master values, in fp32; ``None`` for a frozen parameter."""
    return one_parameter.local_values(param).float() if param.requires_grad else None


def safe_set_local_fp32_param(param: nn.Parameter, value: torch.Tensor) -> None:
    """Replace this rank's part of the master values. A collective: what is computed with follows."""
    one_parameter.set_local_values(param, value)


def safe_get_local_grad(param: nn.Parameter) -> torch.Tensor | None:
    """This rank's part of the reduced gradient."""
    return one_parameter.local_grad(param)


def safe_set_local_grad(param: nn.Parameter, value: torch.Tensor) -> None:
    """Replace this rank's part of the reduced gradient."""
    one_parameter.set_local_grad(param, value)


def safe_get_local_optimizer_state(param: nn.Parameter, optim_state_key: str) -> torch.Tensor | None:
    """This rank's part of what the optimizer keeps under a key."""
    return one_state.local_state(param, optim_state_key)


def safe_set_local_optimizer_state(param: nn.Parameter, value: torch.Tensor, optim_state_key: str) -> None:
    """Replace this rank's part of what the optimizer keeps under a key."""
    one_state.set_local_state(param, optim_state_key, value)
