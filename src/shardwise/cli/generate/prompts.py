"""What is to be continued: one prompt of the command line, or a file of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwise.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """A text, or tokens.

    Attributes:
        id: what its answer is known by: a string or a whole number.
        text, ids: one of them.
        where: what errors call it.
        number: which one it is; what is drawn for it depends on that.
    """

    id: str | int
    text: str | None
    ids: list[int] | None
    where: str
    number: int


def key(value: str | int) -> str:
    """``1`` and ``"1"`` are two ids."""
    return json.dumps(value)


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a JSON Lines file: ``{"id": ..., "prompt": "..."}`` or ``{"id": ..., "ids": [...]}`` each.

    A line without an id has its number, from 1 on. Empty lines are passed over, as are other keys.

    Raises:
        DataError: the file cannot be read, has no prompts, or a line is not as above; names file and line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", where=str(path), fix="check --prompts") from error
    out: list[Prompt] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        prompt = _prompt(line, number, where)
        if (first := seen.setdefault(key(prompt.id), number)) != number:
            raise DataError(f"id {key(prompt.id)} is that of line {first}, too", where=where, fix="give each its own")
        out.append(prompt)
    if not out:
        raise DataError("has no prompts", where=str(path), fix='one {"prompt": "..."} per line')
    return out


def _prompt(line: bytes, number: int, where: str) -> Prompt:
    try:
        found: Any = json.loads(line.decode())
    except ValueError as error:
        raise DataError(f"is no JSON: {error}", where=where, fix='one {"prompt": "..."} per line') from error
    if not isinstance(found, dict) or ("prompt" in found) == ("ids" in found):
        raise DataError("is no object with either 'prompt' or 'ids'", where=where, fix='{"prompt": "..."}')
    name = found.get("id", number)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise DataError(f"id {name!r} is no string or whole number", where=where, fix="give one, or none")
    text, ids = found.get("prompt"), found.get("ids")
    if "prompt" in found and not isinstance(text, str):
        raise DataError("'prompt' is no string", where=where, fix='{"prompt": "..."}, or {"ids": [...]} for tokens')
    if "ids" in found and not (isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)):
        raise DataError("'ids' is no list of tokens", where=where, fix='{"ids": [1, 2, 3]}, with one at least')
    return Prompt(name, text, ids, where, number)


def parse_ids(text: str) -> list[int]:
    """``"1 2 3"`` as tokens; commas will do, too.

    Raises:
        DataError: it is something else, or empty.
    """
    words = text.replace(",", " ").split()
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        raise DataError(f"--ids {text!r} is no list of tokens", fix='--ids "1 2 3"')
    return [int(word) for word in words]
