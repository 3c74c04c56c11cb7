"""``DeepSpeedPlugin``: a DeepSpeed run, described; the sharding engine trains it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shardwise.deepspeed_config import DsFacts, load_ds_config, read_ds_config
from shardwise.deepspeed_config.places import PLACES, section_of
from shardwise.errors import ConfigError
from shardwise.strategy import Strategy


@dataclass
class DeepSpeedPlugin:
    """DeepSpeed's settings, as Accelerate takes them. DeepSpeed itself is not needed.

    Args:
        hf_ds_config: a DeepSpeed configuration: a dict, the path of a JSON file, or an object with one in
            ``config``. ``"auto"`` values are filled from the other arguments.
        gradient_accumulation_steps: micro-batches per optimizer step.
        gradient_clipping: largest norm of all gradients together.
        zero_stage: 0 (``ddp``) to 3; 2 if neither this nor ``hf_ds_config`` is given.
        is_train_batch_min, transformer_moe_cls_names: accepted; nothing here depends on them.
        offload_optimizer_device, offload_param_device: ``none``, ``cpu`` or ``nvme``.
        offload_optimizer_nvme_path, offload_param_nvme_path: folders for ``nvme``.
        zero3_init_flag: accepted, with a warning: models are built whole and then sharded.
        zero3_save_16bit_model: accepted; saved models are whole always.
        enable_msamp: refused, as all of fp8.
        msamp_opt_level: belongs to it.

    ``deepspeed_config`` is the configuration as a dict. Scripts may still change it before the model is prepared.

    Raises:
        ConfigError: a key that asks for something which is not done here, an unknown one, or an argument that
            contradicts the configuration. Keys that only tune DeepSpeed get one warning that lists them.
    """

    hf_ds_config: Any = None
    gradient_accumulation_steps: int | str | None = None
    gradient_clipping: float | str | None = None
    zero_stage: int | None = None
    is_train_batch_min: bool = True
    offload_optimizer_device: str | None = None
    offload_param_device: str | None = None
    offload_optimizer_nvme_path: str | None = None
    offload_param_nvme_path: str | None = None
    zero3_init_flag: bool | None = None
    zero3_save_16bit_model: bool | None = None
    transformer_moe_cls_names: str | None = None
    enable_msamp: bool | None = None
    msamp_opt_level: str | None = None

    def __post_init__(self) -> None:
        if self.enable_msamp:
            raise ConfigError(
                "enable_msamp: fp8 is not served", where="DeepSpeedPlugin", fix="use mixed_precision='bf16'"
            )
        if hasattr(self.hf_ds_config, "trainer_config_process"):  # transformers' Trainer: it builds these itself
            whole = self.hf_ds_config.config
            self.hf_ds_config = {key: value for key, value in whole.items() if key not in ("optimizer", "scheduler")}
        given = self.hf_ds_config not in (None, "none")
        self.deepspeed_config, self._where = load_ds_config(self.hf_ds_config) if given else ({}, "DeepSpeedPlugin")
        if not given and self.zero_stage is None:
            self.zero_stage = 2
        for name, place in PLACES.items():
            self._fill(name, place)
        facts = self.facts()
        self.zero_stage = facts.stage or 0
        self.gradient_accumulation_steps = facts.accumulation or "auto"
        self.gradient_clipping = facts.clipping or "auto"
        self.offload_optimizer_device = {"device": "none"}.get(facts.offload_optimizer, facts.offload_optimizer)
        self.offload_param_device = {"device": "none"}.get(facts.offload_params, facts.offload_params)
        idle = list(facts.idle)
        if self.zero3_init_flag:
            idle.append("zero3_init_flag (models are built whole, then sharded)")
        if idle:
            warnings.warn(f"{self._where}: these have no effect here: {', '.join(idle)}", stacklevel=3)

    def _fill(self, name: str, place: str) -> None:
        """Put an argument into the configuration, or find that the two disagree."""
        value = getattr(self, name)
        if value in (None, "auto"):
            return
        part, key = section_of(self.deepspeed_config, place, self._where)
        present = part.get(key)
        nothing = (None, "auto", "none", 0, False)
        if present not in (*nothing, value) or (present in nothing[2:] and value not in nothing):
            raise ConfigError(
                f"{name}={value!r} and {place}={present!r} contradict each other",
                where=self._where,
                fix=f"say it once, or set {place} to 'auto'",
            )
        part[key] = value

    def facts(self) -> DsFacts:
        """What the configuration says now."""
        return read_ds_config(self.deepspeed_config, self._where, door="accelerate")

    def to_strategy(self) -> Strategy:
        """The strategy that the configuration describes."""
        return Strategy(**self.facts().strategy_arguments())

    @property
    def units(self) -> None:
        """Units are chosen by default."""
        return

    @property
    def accumulation_steps(self) -> int | None:
        """Micro-batches per optimizer step; ``None`` leaves it to the Accelerator."""
        return self.facts().accumulation

    @property
    def max_norm(self) -> float | None:
        """The norm to which gradients are clipped before each step; ``None``: not by this plugin."""
        return self.facts().clipping

    @property
    def scaler_kwargs(self) -> dict[str, Any]:
        """Arguments of ``torch.amp.GradScaler`` under fp16."""
        return dict(self.facts().scaler)

    # --- what scripts ask Accelerate's plugin -------------------------------------------------
    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """The value of ``section.key`` in the configuration, else ``default``."""
        part: Any = self.deepspeed_config
        for step in ds_key_long.split("."):
            if not isinstance(part, dict) or step not in part:
                return default
            part = part[step]
        return part

    def is_auto(self, ds_key_long: str) -> bool:
        """Is ``section.key`` left to the script?"""
        return self.get_value(ds_key_long) == "auto"

    def is_zero3_init_enabled(self) -> bool:
        """Are models partitioned while they are built? Never here."""
        return False

    @contextmanager
    def zero3_init_context_manager(self, enable: bool = False) -> Iterator[None]:
        """Does nothing if ``enable`` is ``False``: models are always built whole.

        Raises:
            ConfigError: ``enable=True``.
        """
        if enable:
            raise ConfigError(
                "models are built whole, then sharded", where="zero3_init_context_manager", fix="pass enable=False"
            )
        yield
