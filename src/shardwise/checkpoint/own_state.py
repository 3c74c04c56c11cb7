"""The small state that every checkpoint of ours has: what ``state.pt`` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwise.checkpoint import small_state
from shardwise.checkpoint.directory import read_whole
from shardwise.checkpoint.manifest import Manifest
from shardwise.errors import CheckpointError
from shardwise.naming import clean_name

_NEEDED = ("state", "extra", "optimizers")


def common_of(path: Path, manifest: Manifest) -> dict[str, Any]:
    """``state.pt`` of a checkpoint. Any rank may call it alone.

    Raises:
        CheckpointError: it is damaged.
    """
    common = parts_of(read_whole(path, manifest.files, ["state.pt"])["state.pt"], path / "state.pt", _NEEDED)
    clean(common)
    return common


def parts_of(data: bytes, path: Path, keys: Sequence[str] = _NEEDED) -> dict[str, Any]:
    """A file's contents, which have these keys.

    Raises:
        CheckpointError: it is damaged, or another file.
    """
    value = small_state.loads(data, path)
    if not isinstance(value, dict) or any(key not in value for key in keys):
        raise CheckpointError("not the file that Shardwise wrote", where=str(path), fix="load another checkpoint")
    return value


def clean(common: dict[str, Any]) -> None:
    """Leave wrappers' components out of the names in small state, as in those of tensors."""
    common["extra"] = {label: cleaned(found) for label, found in common["extra"].items()}
    for saved in common["optimizers"]:
        saved["state"] = cleaned(saved["state"])
        for group in saved["groups"]:
            group["params"] = [clean_name(name) for name in group["params"]]


def cleaned(by_name: Mapping[str, Any]) -> dict[str, Any]:
    return {clean_name(name): value for name, value in by_name.items()}
