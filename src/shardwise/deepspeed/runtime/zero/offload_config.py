"""Homes, and states that an engine may send to one for a while, by DeepSpeed's names."""

from __future__ import annotations

from enum import Enum


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
