"""Where a configuration comes from."""

from __future__ import annotations

import base64
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwise.errors import ConfigError


def load_ds_config(source: Any) -> tuple[dict[str, Any], str]:
    """A configuration as a dict of its own, and where it came from.

    Args:
        source: a mapping, the path of a JSON file (or HJSON, where that package is installed), the JSON object in
            URL-safe base64 (as launchers pass it), or an object that holds a mapping in ``config``.

    Raises:
        ConfigError: it is none of these, or the file is missing or damaged, or says a key twice.
    """
    held = getattr(source, "config", source)
    if isinstance(held, Mapping):
        return _copied(held), "DeepSpeed configuration"
    if not isinstance(source, (str, Path)):
        raise ConfigError(
            f"a DeepSpeed configuration is a dict or the path of a JSON file, not {type(source).__name__}",
            fix="give one of these",
        )
    text = _encoded(source)
    where = str(source) if text is None else "DeepSpeed configuration in base64"
    try:
        if text is None:
            text = Path(source).read_text(encoding="utf-8")
        config = _parsed(text, where)
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error.strerror}", where=where, fix="give the path of the DeepSpeed JSON"
        ) from None
    except ConfigError:  # a ValueError too
        raise
    except ValueError as error:
        fix = "correct the file" if _hjson() is not None else "correct the file; for comments in it, pip install hjson"
        raise ConfigError(f"is not JSON: {error}", where=where, fix=fix) from None
    if not isinstance(config, dict):
        raise ConfigError("holds no JSON object", where=where, fix="correct the file")
    return config, where


def _parsed(text: str, where: str) -> Any:
    """JSON; or HJSON (comments, no quotes), which DeepSpeed takes too, where its package is installed."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return _once(pairs, where)

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError:
        human = _hjson()
        if human is None:
            raise
        return human.loads(text, object_pairs_hook=once)


def _hjson() -> Any:
    try:
        return importlib.import_module("hjson")
    except ImportError:
        return None


def _encoded(source: str | Path) -> str | None:
    """The text that a string holds in base64, if it is not the name of a file."""
    if isinstance(source, Path) or source.endswith(".json") or len(source) < 4:
        return None
    try:
        text = base64.b64decode(source, altchars=b"-_", validate=True).decode("utf-8")
    except ValueError:
        return None
    return text if text.lstrip().startswith("{") else None


def _once(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"'{key}' is there twice in one object", where=where, fix="keep one of them")
        found[key] = value
    return found


def _copied(part: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in part.items()}
