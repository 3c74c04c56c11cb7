"""The monitors of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.deepspeed_config import read_ds_config


def get_monitor_config(param_dict: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sections of monitors that are on, by their names.

    Raises:
        ConfigError: see :func:`shardwise.deepspeed_config.read_ds_config`.
    """
    return read_ds_config(param_dict).monitors
