"""A DeepSpeed configuration that is asked key by key, as transformers' and Accelerate's ``HfDeepSpeedConfig`` is."""

from __future__ import annotations

import base64
import binascii
import copy
import json
from pathlib import Path
from typing import Any

from shardwise.errors import ConfigError


class AskedConfig:
    """A configuration as it was written: what it means is not looked at.

    Args:
        config_file_or_dict: a dict, which is copied, the path of a file, or JSON as text or in base64.

    Raises:
        ConfigError: none of these.
    """

    def __init__(self, config_file_or_dict: Any) -> None:
        self.config: dict[str, Any] = _read(config_file_or_dict)

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
