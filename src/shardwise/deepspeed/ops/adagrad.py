"""DeepSpeed's Adagrad, on torch's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.optim import Adagrad

from shardwise.deepspeed.ops.held import fp32_states_only, listed, no_amsgrad


class DeepSpeedCPUAdagrad(Adagrad):
    """Adagrad (Duchi et al. 2011). ``torch.optim.Adagrad`` does it.

    Args:
        model_params: parameters, or groups of them.
        lr, eps, weight_decay: as in torch.
        amsgrad: must be ``False``.
        fp32_optimizer_states: must be ``True``: state has the dtype of the master values.

    Raises:
        OptimizerError, ConfigError: AMSGrad, or state below fp32.
    """

    def __init__(
        self,
        model_params: Iterable[Any],
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0,
        amsgrad: bool = False,
        fp32_optimizer_states: bool = True,
    ) -> None:
        no_amsgrad("DeepSpeedCPUAdagrad", amsgrad)
        fp32_states_only("DeepSpeedCPUAdagrad", fp32_optimizer_states)
        params = listed(model_params)
        super().__init__(params, lr=lr, eps=eps, weight_decay=weight_decay)
