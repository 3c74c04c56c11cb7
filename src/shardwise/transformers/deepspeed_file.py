"""``TrainingArguments(deepspeed=...)``: the file is read here, and DeepSpeed is not needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from shardwise.compat.plugins import DeepSpeedPlugin
from shardwise.deepspeed_config import load_ds_config
from shardwise.errors import ConfigError

_BUILT_HERE = ("optimizer", "scheduler")


class DeepSpeedFile:
    """A DeepSpeed configuration whose ``"auto"`` values are those of the arguments.

    Args:
        args: ``TrainingArguments`` with ``deepspeed``.

    Raises:
        ConfigError: it says something else than the arguments; all such keys are named. Or it is none, or asks for
            something that is not served.
    """

    def __init__(self, args: Any) -> None:
        self.args = args
        self.config, self.where = load_ds_config(args.deepspeed)
        self._mismatches: list[str] = []
        self._fill_from_arguments()
        self._report()

    def plugin(self) -> DeepSpeedPlugin:
        """What the Accelerator is told. Raises ConfigError for what is not served."""
        return DeepSpeedPlugin(hf_ds_config={k: v for k, v in self.config.items() if k not in _BUILT_HERE})

    def optimizer(self, parameters: Iterable[nn.Parameter], model: nn.Module) -> Optimizer | None:
        """The optimizer of the section ``optimizer``; ``None`` without one."""
        from shardwise.deepspeed.ops.building import build_optimizer

        section = self.config.get("optimizer")
        if not section:
            return None
        return build_optimizer(section.get("type", ""), parameters, section.get("params"), model=model)

    def scheduler(self, optimizer: Any, steps: int) -> Any:
        """The schedule of the section ``scheduler``; ``None`` without one.

        Args:
            optimizer: what it schedules.
            steps: optimizer steps that the training takes.
        """
        from shardwise.deepspeed.runtime.lr_schedules import build_scheduler

        section = self.config.get("scheduler")
        if not section:
            return None
        self._fill("scheduler.params.total_num_steps", steps, "max_steps")
        self._fill("scheduler.params.warmup_num_steps", max(1, self.args.get_warmup_steps(steps)), "warmup_steps")
        self._report()
        return build_scheduler(section.get("type", ""), optimizer, section.get("params"))

    def _fill_from_arguments(self) -> None:
        args = self.args
        batch, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
        self._fill("train_micro_batch_size_per_gpu", batch, "per_device_train_batch_size")
        self._fill("gradient_accumulation_steps", steps, "gradient_accumulation_steps")
        self._fill("train_batch_size", args.world_size * batch * steps, "the batch of all ranks")
        self._fill("gradient_clipping", args.max_grad_norm, "max_grad_norm")
        self._fill("optimizer.params.lr", args.learning_rate, "learning_rate")
        self._fill("optimizer.params.betas", [args.adam_beta1, args.adam_beta2], "adam_beta1 and adam_beta2")
        self._fill("optimizer.params.eps", args.adam_epsilon, "adam_epsilon")
        self._fill("optimizer.params.weight_decay", args.weight_decay, "weight_decay")
        self._fill("scheduler.params.warmup_min_lr", 0, "")
        self._fill("scheduler.params.warmup_max_lr", args.learning_rate, "learning_rate")
        for half in ("fp16", "bf16"):
            asked = getattr(args, half) or getattr(args, f"{half}_full_eval")
            self._fill(f"{half}.enabled", asked, f"{half} or {half}_full_eval")

    def _fill(self, place: str, value: Any, name: str) -> None:
        """Put a value where ``"auto"`` is. Where another one is, remember it.

        Args:
            name: of the argument; empty: the file may say something else.
        """
        *path, key = place.split(".")
        section: Any = self.config
        for step in path:
            section = section.get(step) if isinstance(section, dict) else None
        if not isinstance(section, dict) or key not in section:
            return
        if section[key] == "auto":
            section[key] = value
        elif name and section[key] is not None and section[key] != value:
            self._mismatches.append(f"{place} is {section[key]!r}, and {name} {value!r}")

    def _report(self) -> None:
        if self._mismatches:
            lines = "".join(f"\n    {line}" for line in self._mismatches)
            raise ConfigError(
                f"it says something else than the training arguments:{lines}",
                where=self.where,
                fix="write 'auto' for these in the file",
            )
