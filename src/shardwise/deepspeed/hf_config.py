"""What transformers asks before it builds a model: is there a configuration, and does it split parameters?"""

from __future__ import annotations

import base64
import binascii
import copy
import json
import sys
import weakref
from pathlib import Path
from typing import Any

from shardwise.errors import ConfigError

_live: weakref.ref[HfDeepSpeedConfig] | None = None


class HfDeepSpeedConfig:
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
        self.config: dict[str, Any] = _read(config_file_or_dict)
        _live = weakref.ref(self)
        other = sys.modules.get("deepspeed")
        if other is not None and other is sys.modules.get("shardwise.deepspeed"):
            from transformers.integrations.deepspeed import set_hf_deepspeed_config

            set_hf_deepspeed_config(self)

    def find_config_node(self, ds_key_long: str) -> tuple[dict[str, Any] | None, str]:
        """The section that has the last part of ``section.key``, and that part."""
        *path, key = ds_key_long.split(".")
        section: Any = self.config
        for step in path:
            section = section.get(step)
            if not isinstance(section, dict):
                return None, key
        return section, key

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """The value of ``section.key``, else ``default``."""
        section, key = self.find_config_node(ds_key_long)
        return default if section is None else section.get(key, default)

    def del_config_sub_tree(self, ds_key_long: str, must_exist: bool = False) -> None:
        """Take out ``section.key``.

        Raises:
            ConfigError: ``must_exist``, and it is not there.
        """
        section, key = self.find_config_node(ds_key_long)
        if (section is None or section.pop(key, None) is None) and must_exist:
            raise ConfigError(f"there is no {ds_key_long}", where="HfDeepSpeedConfig", fix="leave must_exist out")

    def is_true(self, ds_key_long: str) -> bool:
        """Is it there, and true?"""
        return bool(self.get_value(ds_key_long))

    def is_false(self, ds_key_long: str) -> bool:
        """Is it there, and false?"""
        value = self.get_value(ds_key_long)
        return value is not None and not value

    def is_zero2(self) -> bool:
        return bool(self.get_value("zero_optimization.stage") == 2)

    def is_zero3(self) -> bool:
        return bool(self.get_value("zero_optimization.stage") == 3)

    def is_offload(self) -> bool:
        """Are optimizer state or parameters offloaded, under stage 2 or 3?"""
        homes = {self.get_value(f"zero_optimization.offload_{what}.device") for what in ("optimizer", "param")}
        return (self.is_zero2() or self.is_zero3()) and not homes.isdisjoint(("cpu", "nvme"))


def is_deepspeed_zero3_enabled() -> bool:
    """Does a live :class:`HfDeepSpeedConfig` split parameters?"""
    found = None if _live is None else _live()
    return found is not None and found.is_zero3()


def deepspeed_config() -> dict[str, Any] | None:
    """The configuration of the live :class:`HfDeepSpeedConfig`, if there is one."""
    found = None if _live is None else _live()
    return None if found is None else found.config


def _read(given: Any) -> dict[str, Any]:
    if isinstance(given, dict):
        return copy.deepcopy(given)
    text = str(given)
    found: Any = None
    try:
        if not text.lstrip().startswith("{") and Path(text).is_file():
            text = Path(text).read_text()
        elif not text.lstrip().startswith("{"):
            text = base64.urlsafe_b64decode(text).decode()
        found = json.loads(text)
    except (OSError, ValueError, binascii.Error):
        found = None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{given!r} is no DeepSpeed configuration",
            where="HfDeepSpeedConfig",
            fix="give a dict, the path of a JSON file, or JSON in base64",
        )
    return found
