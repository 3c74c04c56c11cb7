"""Homes, states that an engine may send to one for a while, and the offload blocks, by DeepSpeed's names."""

from __future__ import annotations

from enum import Enum
from typing import Any, ClassVar

from shardwise.deepspeed_config.tables import TABLES
from shardwise.errors import ConfigError, did_you_mean


class OffloadDeviceEnum(str, Enum):
    """``device`` of an offload block."""

    none = "none"
    cpu = "cpu"
    nvme = "nvme"


class OffloadStateTypeEnum(str, Enum):
    """What ``engine.offload_states(include=...)`` takes."""

    optim_states = "optim_states"
    hp_params = "hp_params"
    lp_params = "lp_params"
    lp_grads = "lp_grads"
    contiguous_grad_buffer = "contiguous_grad_buffer"


class Section:
    """A section of a configuration as an object. A key that was not said is ``None``.

    Raises:
        ConfigError: a key that the section does not have.
    """

    _inside: ClassVar[str]

    def __init__(self, **data: Any) -> None:
        table = TABLES[self._inside]
        for name, value in data.items():
            if name not in table:
                raise ConfigError(
                    f"{self._inside}.{name} is not a key of DeepSpeed that is known here",
                    where=type(self).__name__,
                    fix=did_you_mean(name, table, otherwise="leave it out"),
                )
            newest = name.removeprefix("stage3_").replace("fp16_weights", "16bit_weights")
            setattr(self, newest if newest in table else name, value)

    def __getattr__(self, name: str) -> Any:
        if name in TABLES[self._inside]:
            return None
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.model_dump().items())})"

    def model_dump(self) -> dict[str, Any]:
        """What was said, as a dict that a configuration may hold."""
        return {name: _plain(value) for name, value in vars(self).items() if value is not None}


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump()
    return value.value if isinstance(value, Enum) else value


class DeepSpeedZeroOffloadParamConfig(Section):
    """``offload_param``."""

    _inside = "zero_optimization.offload_param"

    def __init__(self, **data: Any) -> None:
        super().__init__(**data)
        self.device = OffloadDeviceEnum(_plain(data.get("device") or "none"))


class DeepSpeedZeroOffloadOptimizerConfig(DeepSpeedZeroOffloadParamConfig):
    """``offload_optimizer``."""

    _inside = "zero_optimization.offload_optimizer"

    def __init__(self, **data: Any) -> None:
        super().__init__(**data)
        self.ratio = data.get("ratio", 1.0)
