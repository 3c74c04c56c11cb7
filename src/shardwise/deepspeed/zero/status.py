"""Where a parameter's values are, in DeepSpeed's words."""

from __future__ import annotations

from enum import Enum


class ZeroParamStatus(Enum):
    """Are a parameter's whole values on this rank?"""

    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class ZeroParamType(Enum):
    """How a parameter is kept. Whatever is split here is ``NORMAL``."""

    NORMAL = 1
    PARTITIONED = 2
    REMOTE = 3


class DeepSpeedTensorOverride(Enum):
    """What ``zero.Init`` may decide for new tensors."""

    dtype = 1
    device = 2
