"""Files of settings: our own YAML, or Accelerate's. Without torch, so that ``shardwise config`` answers at once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from shardwise.cli.accelerate_file import translate
from shardwise.cli.settings import Settings, unknown_key
from shardwise.errors import LaunchError, ShardwiseError, first_line

_ACCELERATE_MARKS = ("compute_environment", "distributed_type")


@dataclass(frozen=True)
class SettingsFile:
    """A file that was read.

    Attributes:
        path: where it is.
        settings: what it says.
        kind: ``shardwise`` or ``accelerate``.
        notes: what of an Accelerate file the user has to do otherwise now.
        dropped: keys of an Accelerate file that mean nothing here, and why.
    """

    path: Path
    settings: Settings
    kind: str = "shardwise"
    notes: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)


def default_path() -> Path:
    """``$XDG_CONFIG_HOME/shardwise/config.yaml``, or the same under ``~/.config``."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "shardwise" / "config.yaml"


def read(path: Path) -> SettingsFile:
    """Read a file of settings: ours, or Accelerate's, told apart by its keys.

    Raises:
        LaunchError: there is no such file, it is no YAML, or it has a key or value that does not exist.
        ShardwiseError: it asks for something that cannot be done.
    """
    values = load_yaml(path)
    if any(key in values for key in _ACCELERATE_MARKS):
        settings, notes, dropped = translate(values, path)
        found = SettingsFile(path, settings, "accelerate", notes, dropped)
    else:
        found = SettingsFile(path, _from_mapping(values, path))
    try:
        found.settings.check(complete=False)
    except ShardwiseError as error:
        where = f"{path}, {error.where}" if error.where else str(path)
        raise type(error)(error.what, where=where, fix=error.fix) from None
    return found


def dump(settings: Settings) -> str:
    """The YAML text of what was said; :func:`read` gives equal settings back."""
    return yaml.safe_dump(settings.said(), sort_keys=False)


def write(settings: Settings, path: Path) -> None:
    """Write a file. It is there whole or not at all.

    Raises:
        LaunchError: the folder cannot be written to.
    """
    text = f"# Settings of 'shardwise launch'; flags win over them. Written by 'shardwise config'.\n{dump(settings)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise LaunchError(
            f"cannot write {path}: {error.strerror or error}", fix="choose another file with --config-file"
        ) from error


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice: the plain loader drops the first without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if isinstance(name, str) and name in seen:
                raise yaml.MarkedYAMLError(problem=f"'{name}' is given twice", problem_mark=key.start_mark)
            if isinstance(name, str):
                seen.add(name)
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML (or JSON) file; an empty file has none.

    Raises:
        LaunchError: no such file, not text, not YAML (with the line), or not keys and values.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        fix = "'shardwise config' writes one" if not path.exists() else "check that it is a file you may read"
        raise LaunchError(f"cannot read {path}: {error.strerror or error}", fix=fix) from None
    except UnicodeDecodeError:
        raise LaunchError(f"{path} is not a text file", fix="give a YAML file of settings") from None
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{path}, line {mark.line + 1}" if mark is not None else str(path)
        raise LaunchError(f"not valid YAML: {error.problem}", where=line, fix="one 'key: value' per line") from None
    except yaml.YAMLError as error:
        raise LaunchError(f"not valid YAML: {first_line(error)}", where=str(path)) from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise LaunchError(f"{path} does not hold keys and values", fix="one 'key: value' per line")
    return values


def _from_mapping(values: dict[str, Any], path: Path) -> Settings:
    kinds = {f.name: str(f.type).removesuffix(" | None") for f in fields(Settings)}
    read: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in kinds:
            raise unknown_key(key, list(kinds), path)
        if value is None:
            continue
        read[name] = _value(name, value, kinds[name], path)
    return Settings(**read)


def _value(name: str, value: Any, kind: str, path: Path) -> Any:
    if name == "mixed_precision" and value is False:
        return "no"  # YAML reads a bare no as false
    if kind == "str" and isinstance(value, (str, int)) and not isinstance(value, bool):
        return str(value)
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    what = {"int": "a whole number", "bool": "true or false", "str": "text"}[kind]
    raise LaunchError(f"'{name}: {value}' is not {what}", where=str(path), fix=f"give {name} {what}")
