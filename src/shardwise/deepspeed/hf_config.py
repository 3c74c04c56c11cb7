"""What transformers asks before it builds a model: is there a configuration, and does it split parameters?"""

from __future__ import annotations

import sys
import weakref
from typing import Any

from shardwise.deepspeed_config.asked import AskedConfig

_live: weakref.ref[HfDeepSpeedConfig] | None = None


class HfDeepSpeedConfig(AskedConfig):
    """A DeepSpeed configuration that :func:`is_deepspeed_zero3_enabled` asks, for as long as it lives.

    Where the program has put ``shardwise.deepspeed`` in the place of ``deepspeed`` (``sys.modules``), transformers asks
    it too, and builds models under ``zero.Init``.

    Args:
        config_file_or_dict: a dict, which is copied, the path of a file, or JSON as text or in base64.

    Raises:
        ConfigError: none of these.
    """

    def __init__(self, config_file_or_dict: Any) -> None:
        global _live
        super().__init__(config_file_or_dict)
        _live = weakref.ref(self)
        other = sys.modules.get("deepspeed")
        if other is not None and other is sys.modules.get("shardwise.deepspeed"):
            from transformers.integrations.deepspeed import set_hf_deepspeed_config

            set_hf_deepspeed_config(self)


def is_deepspeed_zero3_enabled() -> bool:
    """Does a live :class:`HfDeepSpeedConfig` split parameters?"""
    found = None if _live is None else _live()
    return found is not None and found.is_zero3()


def deepspeed_config() -> dict[str, Any] | None:
    """The configuration of the live :class:`HfDeepSpeedConfig`, if there is one."""
    found = None if _live is None else _live()
    return None if found is None else found.config
