"""The part of an engine that makes room on the device: its states wait on the host for a while."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shardwise.deepspeed.engine_saving import Saving
from shardwise.engine.asleep import Asleep, put_to_sleep
from shardwise.engine.hooks import engine_of
from shardwise.errors import ConfigError, UnitError

_KINDS = {
    "optim_states": "optimizer",
    "hp_params": "masters",
    "lp_params": "parameters",
    "lp_grads": None,  # there are none between two steps
    "contiguous_grad_buffer": None,
}


class States(Saving):
    _asleep: Asleep | None = None

    def offload_states(
        self,
        include: Iterable[Any] | None = None,
        device: Any = "cpu",
        pin_memory: bool = True,
        non_blocking: bool = False,
    ) -> None:
        """Move states from the device to the host, until :meth:`reload_states`.

        Without parameters (``lp_params``) among them the model can run meanwhile, and not be trained. Between two steps
        there are no gradients, so ``lp_grads`` and ``contiguous_grad_buffer`` move nothing. On the CPU nothing moves,
        and the same uses are refused.

        Args:
            include: of ``OffloadStateTypeEnum``, or their names; all by default.
            device: ``cpu``.
            pin_memory: page-lock the host memory, where that can be done.
            non_blocking: accepted; the call returns when the bytes have moved.

        Raises:
            ConfigError: another device, or an unknown state.
            UnitError: states are away already, or gradients wait for a step.
        """
        home = str(getattr(device, "value", device))
        if home != "cpu":
            raise ConfigError(
                f"states cannot wait on '{home}'", where="offload_states",
                fix="device='cpu'; for a home on a disk: offload_optimizer with device nvme in the configuration",
            )  # fmt: skip
        wanted = [str(getattr(state, "value", state)) for state in (_KINDS if include is None else include)]
        if odd := [name for name in wanted if name not in _KINDS]:
            raise ConfigError(f"'{odd[0]}' is no state", where="offload_states", fix=f"of {', '.join(_KINDS)}")
        if self._asleep is not None:
            raise UnitError("states are on the host already", where="offload_states", fix="engine.reload_states()")
        engine = engine_of(self.module)
        if engine is None:
            return
        self._asleep = put_to_sleep(
            engine,
            [] if self.optimizer is None else [self.optimizer.optimizer],
            {kind for name in wanted if (kind := _KINDS[name]) is not None},
            pin_memory,
            "engine.reload_states()",
        )

    def reload_states(self, non_blocking: bool = False) -> None:
        """Move back what :meth:`offload_states` has moved. Without such a call before, nothing happens."""
        if self._asleep is not None:
            self._asleep.wake()
            self._asleep = None
